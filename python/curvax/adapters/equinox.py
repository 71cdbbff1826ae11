"""Modules of Equinox (the extra `equinox`)."""

from collections.abc import Callable
from typing import Any

import jax

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.batches import first
from curvax.adapters.frameworks import import_framework
from curvax.adapters.jax_libraries import JaxSource, adapt, mean_of, value_and_gradient
from curvax.options import takes_options

eqx = import_framework("equinox", "equinox")


@takes_options()
def from_module(
    module: Any,
    *,
    loss: Callable[[Any, Any], Any],
    state: Any = None,
    batched: bool = False,
    example: Any = None,
    inputs: Callable[[Any], Any] = first,
) -> AdaptedModel:
    """An Equinox module and a loss as a model.

    `params` is the module with its floating arrays (`equinox.partition`); everything else is
    constant. A leaf's name is its path, such as `layers.0.weight`.

    Args:
        module: callable on one sample, in inference mode, as by `equinox.nn.inference_mode`.
        loss: `loss(outputs, batch)`, as for `curvax.ggn`.
        state: of a module with state, as `BatchNorm` has; it is then called with it, and returns
            it.
        batched: whether the module takes a whole batch; if not, it is mapped over the samples.
        example: a batch to compare the module with the model on, now; None to compare on the first
            batch that an operator is made of.
        inputs: gets the module's argument out of a batch.

    Returns:
        The model, with `verify(hvp=True)`.

    Raises:
        TypeError: not an Equinox module, or a loss that is not callable.
        ValueError: active dropout, batch normalisation in train mode, no parameters, parameters
            that are NaN, or a model that does not compute what the module computes.
        ImportError: equinox is not installed.
    """
    if not (isinstance(module, eqx.Module) and callable(module)):
        raise TypeError(f"module must be a callable equinox.Module, got {type(module).__name__}")
    _check_inference(module)
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def call(whole: Any, batch: Any) -> Any:
        function = whole if state is None else lambda x: whole(x, state)[0]
        return (function if batched else jax.vmap(function))(inputs(batch))

    def forward(params: Any, batch: Any) -> Any:
        return call(eqx.combine(params, static), batch)

    def value(whole: Any, batch: Any) -> Any:
        outputs = call(whole, batch)
        return mean_of(loss(outputs, batch)), outputs

    def transform(function: Any) -> Any:
        return eqx.filter_jit(eqx.filter_value_and_grad(function, has_aux=True))

    def run(batch: Any) -> Any:
        return value_and_gradient("Equinox", transform, value, module, batch)

    return adapt(JaxSource("Equinox", run), params, forward, loss, example)


def _check_inference(module: Any) -> None:
    varying = (eqx.nn.Dropout, eqx.nn.BatchNorm)
    for part in jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, varying)):
        if not isinstance(part, varying) or part.inference:
            continue
        if isinstance(part, eqx.nn.Dropout) and part.p == 0:
            continue
        what = (
            f"drops out with p = {part.p}"
            if isinstance(part, eqx.nn.Dropout)
            else "normalises by the batch, and changes its statistics"
        )
        raise ValueError(
            f"module must compute the same in every call: a {type(part).__name__} {what}. Pass "
            "equinox.nn.inference_mode(module)"
        )
