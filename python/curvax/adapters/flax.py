"""Modules of Flax, NNX and Linen (the extra `flax`)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.batches import first
from curvax.adapters.frameworks import import_framework
from curvax.adapters.jax_libraries import (
    JaxSource,
    adapt,
    jit_value_and_grad,
    mean_of,
    value_and_gradient,
)
from curvax.filters import leaf_names
from curvax.options import takes_options

linen = import_framework("flax.linen", "flax")
nnx = import_framework("flax.nnx", "flax")


@takes_options()
def from_nnx(
    module: Any,
    *,
    loss: Callable[[Any, Any], Any],
    example: Any = None,
    inputs: Callable[[Any], Any] = first,
) -> AdaptedModel:
    """An NNX module and a loss as a model.

    `params` is a dict of dicts, by attribute, of the module's `nnx.Param`; everything else, as
    running statistics, is constant. A parameter that is shared is one leaf.

    Args:
        module: in evaluation mode, as by `module.eval()`.
        loss: `loss(outputs, batch)`, as for `curvax.ggn`.
        example: a batch to compare the module with the model on, now; None to compare on the first
            batch that an operator is made of.
        inputs: gets the module's argument out of a batch.

    Returns:
        The model, with `verify(hvp=True)`.

    Raises:
        TypeError: not an NNX module, or a loss that is not callable.
        ValueError: active dropout, batch normalisation in train mode, no parameters, parameters
            that are NaN, or a model that does not compute what the module computes.
        ImportError: flax is not installed.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be a flax.nnx.Module, got {type(module).__name__}")
    for path, part in nnx.iter_modules(module):
        active = isinstance(part, nnx.Dropout) and part.rate > 0 and not part.deterministic
        training = isinstance(part, nnx.BatchNorm) and not part.use_running_average
        if active or training:
            what = "drops out" if active else "normalises by the batch, and changes its statistics"
            place = ".".join(map(str, path)) or type(part).__name__
            raise ValueError(
                f"module must compute the same in every call: {place!r} ({type(part).__name__}) "
                f"{what}. Call module.eval() first"
            )
    graph, state, rest = nnx.split(module, nnx.Param, ...)

    def forward(params: Any, batch: Any) -> Any:
        own = jax.tree.map(lambda leaf: leaf, state)  # replaced in place
        nnx.replace_by_pure_dict(own, params)
        # A copy of what is shared: an update of it within a trace would outlive the trace.
        return nnx.merge(graph, own, rest, copy=True)(inputs(batch))

    def value(whole: Any, batch: Any) -> Any:
        outputs = whole(inputs(batch))
        return mean_of(loss(outputs, batch)), outputs

    def transform(function: Any) -> Any:
        wrt = nnx.DiffState(0, nnx.Param)
        return nnx.jit(nnx.value_and_grad(function, argnums=wrt, has_aux=True))

    def run(batch: Any) -> Any:
        # A clone: what a call changes would stay in the user's module.
        clone = nnx.clone(module)
        before = _numbers(clone)
        found, gradient = value_and_gradient("NNX", transform, value, clone, batch)
        after = _numbers(clone)
        changed = [
            n for n, x in after.items() if n not in before or not np.array_equal(x, before[n])
        ]
        if changed:
            raise ValueError(
                f"module must compute the same in every call: {changed[0]!r} changes, as it does "
                "where random numbers are drawn or statistics kept. Call module.eval() first"
            )
        return found, nnx.to_pure_dict(gradient)

    return adapt(JaxSource("NNX", run), nnx.to_pure_dict(state), forward, loss, example)


def _numbers(module: Any) -> dict[str, Any]:
    """The state of a module besides its parameters and keys, by name."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))
    named = zip(leaf_names(state), jax.tree.leaves(state), strict=True)
    keys = jax.dtypes.prng_key
    return {n: np.asarray(x) for n, x in named if not jnp.issubdtype(x.dtype, keys)}


@takes_options()
def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    *,
    loss: Callable[[Any, Any], Any],
    example: Any = None,
    inputs: Callable[[Any], Any] = first,
    **options: Any,
) -> AdaptedModel:
    """A Linen module, its variables and a loss as a model.

    `params` is the collection of that name; the others, as `batch_stats`, are constants.

    Args:
        module: the module.
        variables: what `module.init` returned, or training.
        loss: as for `from_nnx`.
        example: as for `from_nnx`.
        inputs: as for `from_nnx`.
        **options: of each call of the module, such as `train=False` or `deterministic=True`.

    Returns:
        As for `from_nnx`.

    Raises:
        TypeError: not a Linen module, or a loss that is not callable.
        ValueError: variables without `params`, and as for `from_nnx`.
        ImportError: flax is not installed.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {type(module).__name__}")
    if not isinstance(variables, Mapping) or "params" not in variables:
        held = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"variables must be what module.init returns, with 'params', got {held}: pass "
            "{'params': params}"
        )
    rest = {name: value for name, value in variables.items() if name != "params"}
    errors = import_framework("flax.errors", "flax")

    def apply(all_variables: Any, batch: Any) -> Any:
        try:
            return module.apply(all_variables, inputs(batch), **options)
        except (errors.InvalidRngError, errors.ModifyScopeVariableError) as error:
            raise ValueError(
                "module must compute the same in every call: it draws random numbers, or changes "
                f"its state ({type(error).__name__}). Pass the options that turn off dropout and "
                "batch statistics, such as train=False, deterministic=True or "
                "use_running_average=True"
            ) from error

    def forward(params: Any, batch: Any) -> Any:
        return apply({"params": params, **rest}, batch)

    def value(params: Any, batch: Any) -> Any:
        outputs = apply({**variables, "params": params}, batch)
        return mean_of(loss(outputs, batch)), outputs

    def run(batch: Any) -> Any:
        return value_and_gradient("Linen", jit_value_and_grad, value, variables["params"], batch)

    return adapt(JaxSource("Linen", run), variables["params"], forward, loss, example)
