"""What the adapters of libraries that run on JAX share."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.verification import SourceValues
from curvax.arrays import to_array
from curvax.filters import leaf_names


_DERIVATIVE_HINT = (
    " Replace the operation by plain operations of JAX, or give it a rule by jax.custom_jvp; or take "
    "differences of the gradient, hessian(loss, params, batches, method='finite_difference') with "
    "functions of your own"
)


class JaxSource:
    """See `curvax.adapters.adapted.Source`; of a library that has no derivatives but JAX's.

    Attributes:
        framework: its name.
        run: gets `((loss, outputs), gradient)` of the source's own module on a batch; the gradient
            has the structure of `params`.
    """

    def __init__(self, framework: str, run: Callable[[Any], Any]) -> None:
        self.framework = framework
        self.run = run

    def evaluate(self, batch: Any) -> SourceValues:
        """See `Source`."""
        (loss, outputs), gradient = self.run(batch)
        leaves = zip(leaf_names(gradient), jax.tree.leaves(gradient), strict=True)
        return SourceValues(
            jax.tree.map(np.asarray, outputs),
            float(loss),
            {name: np.asarray(leaf) for name, leaf in leaves},
        )

    def derivatives(self, batch: Any, vector: Mapping[str, Any]) -> None:
        """See `Source`."""


def mean_of(loss: Any) -> Any:
    """The mean that a loss returned, by itself or with its weight."""
    return loss[0] if isinstance(loss, tuple) else loss


def jit_value_and_grad(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`transform` of `value_and_gradient`, for a pytree of parameters."""
    return jax.jit(jax.value_and_grad(function, has_aux=True))


def value_and_gradient(
    framework: str,
    transform: Callable[[Any], Any],
    value: Callable[[Any, Any], Any],
    module: Any,
    batch: Any,
) -> Any:
    """What `transform(value)(module, batch)` returns.

    Args:
        framework: the library, for messages.
        transform: its `value_and_grad`.
        value: `value(module, batch)` returns the loss and something else.
        module: what it is differentiated in.
        batch: the data.

    Raises:
        TypeError: the loss can be computed, but has no gradient.
        Exception: what `value` raises.
    """
    try:
        return transform(value)(module, batch)
    except Exception as error:
        value(module, batch)  # raises what has nothing to do with derivatives
        raise TypeError(
            f"the {framework} model has no gradient, so that it has no curvature: JAX says "
            f"{type(error).__name__}: {error}. Replace the operation by one that JAX "
            "differentiates, or give it a rule by jax.custom_jvp"
        ) from error


def adapt(
    source: JaxSource,
    params: Any,
    forward: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any], Any],
    example: Any,
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
        ValueError: no parameters, or one that is NaN or infinite.
    """
    names = leaf_names(params)
    if not names:
        raise ValueError(
            f"the {source.framework} model must have parameters to differentiate in, got none: "
            "are all frozen, or integers?"
        )
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
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
