"""What the adapters of libraries that run on JAX share."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.verification import SourceValues
from curvax.arrays import to_array
from curvax.checks import cut
from curvax.filters import leaf_names
from curvax.typing import Batch, LossValue, Params, PyTree

_PARTS = (
    "A batch is (inputs, targets), unless inputs= and the loss get other parts out of it: do its "
    "structure, shapes and dtypes fit the model and the loss?"
)
_DERIVATIVE_HINT = (
    " Replace the operation by plain operations of JAX, or give it a rule by jax.custom_jvp; or "
    "take differences of the gradient, hessian(loss, params, batches, method='finite_difference') "
    "with functions of your own"
)


class JaxSource:
    """See `curvax.adapters.adapted.Source`; of a library that has no derivatives but JAX's.

    Attributes:
        framework: its name.
        run: gets `((loss, outputs), gradient)` of the source's own module on a batch; the gradient
            has the structure of `params`.
        bits: of the coarsest numbers that it may compute in, whatever the model's are.
    """

    def __init__(self, framework: str, run: Callable[[Batch], PyTree], bits: int = 64) -> None:
        self.framework = framework
        self.run = run
        self.bits = bits

    def evaluate(self, batch: Batch) -> SourceValues:
        """See `Source`."""
        (loss, outputs), gradient = self.run(batch)
        leaves = zip(leaf_names(gradient), jax.tree.leaves(gradient), strict=True)
        return SourceValues(
            jax.tree.map(np.asarray, outputs),
            float(loss),
            {name: np.asarray(leaf) for name, leaf in leaves},
            self.bits,
        )

    def derivatives(self, batch: Batch, vector: Mapping[str, PyTree]) -> None:
        """See `Source`."""


def mean_of(loss: Any) -> Any:
    """The mean that a loss returned, by itself or with its weight; 0 where nothing counts."""
    if not isinstance(loss, tuple):
        return loss
    mean, weight = loss
    return jnp.where(jnp.asarray(weight) > 0, mean, 0)


def jit_value_and_grad(
    function: Callable[[PyTree, Batch], LossValue],
) -> Callable[[PyTree, Batch], LossValue]:
    """`transform` of `value_and_gradient`, for a pytree of parameters."""
    return jax.jit(jax.value_and_grad(function, has_aux=True))


def value_and_gradient(
    framework: str,
    transform: Callable[[Any], Any],
    value: Callable[[PyTree, Batch], LossValue],
    module: object,
    batch: Batch,
    parts: str = _PARTS,
) -> PyTree:
    """What `transform(value)(module, batch)` returns.

    Args:
        framework: the library, for messages.
        transform: its `value_and_grad`.
        value: `value(module, batch)` returns the loss and something else.
        module: what it is differentiated in.
        batch: the data.
        parts: what its parts must be, for a note to what `value` raises.

    Raises:
        TypeError: the loss can be computed, but has no gradient.
        ValueError: the loss is not finite.
        Exception: what `value` raises.
    """
    try:
        found = transform(value)(module, batch)
    except Exception as error:
        with noted(batch, parts):
            value(module, batch)  # raises what has nothing to do with derivatives
        raise TypeError(
            f"the {framework} model has no gradient, so that it has no curvature: JAX says "
            f"{type(error).__name__}: {error}. Replace the operation by one that JAX "
            "differentiates, or give it a rule by jax.custom_jvp"
        ) from error
    loss = found[0][0]
    if not bool(jnp.isfinite(loss)):
        with noted(batch, parts):
            value(module, batch)  # names a label out of range, which a compiled program cannot
            raise ValueError(
                f"the loss is {loss} on the batch: check the parameters, the data, and that the "
                "loss can take such outputs"
            )
    return found


@contextlib.contextmanager
def noted(batch: Batch, parts: str) -> Iterator[None]:
    """Add to an error what the batch looks like, and what its parts must be."""
    try:
        yield
    except Exception as error:
        looks = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", batch)
        error.add_note(f"The batch is {cut(str(looks))}. {parts}")
        raise


def adapt(
    source: JaxSource,
    params: Params,
    forward: Callable[[Params, Batch], PyTree],
    loss: Callable[[PyTree, Batch], LossValue],
    example: Batch,
    kind: type[AdaptedModel] = AdaptedModel,
    **fields: Any,
) -> AdaptedModel:
    """The model of a library that runs on JAX, compared on `example` if there is one.

    Args:
        source: where it came from.
        params: the parameters.
        forward: see `Model`.
        loss: see there.
        example: a batch, or None.
        kind: the class of the model.
        **fields: what it has besides those of `AdaptedModel`.

    Raises:
        TypeError: the loss is not callable.
        ValueError: no parameters, or one that is NaN, infinite, or not in 32 or 64 bits.
    """
    names = leaf_names(params)
    if not names:
        raise ValueError(
            f"the {source.framework} model must have parameters to differentiate in, got none: "
            "are all frozen, or integers?"
        )
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"parameter {name!r} must be float32 or float64, got {leaf.dtype}: integers, also "
                "quantised weights, have no derivatives, and 16 bits are too coarse for second "
                "ones. Cast the parameters, or analyse the model as it was before"
            )
        if not bool(jnp.isfinite(leaf).all()):
            raise ValueError(
                f"parameter {name!r} is not finite: {int((~jnp.isfinite(leaf)).sum())} of "
                f"{leaf.size} entries are NaN or infinite. Check the checkpoint"
            )
    model = kind(
        params,
        forward,
        loss,
        {name: name for name in names},
        source=source,
        convert=lambda batch: jax.tree.map(lambda x: to_array(x, "an array of the batch"), batch),
        hint=" Does the model draw random numbers, or change its state in a call?",
        derivative_hint=_DERIVATIVE_HINT,
        **fields,
    )
    if example is not None:
        model.verify(example)
    return model
