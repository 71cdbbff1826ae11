"""The weighted sum of cross entropies of rows of logits, as a twice differentiable scalar.

The slot is the logits `(N, V)`; the data are the labels `(N,)`, int32, and the weights `(N,)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from curvax.compiled import row_sums
from curvax.ops.manual_axes import zeros_beside
from curvax.ops.second_order import ScalarLoss, TwiceDifferentiable
from curvax.ops.softmax_ce import reference
from curvax.ops.softmax_ce.api import softmax_ce_hvp, softmax_ce_triple
from curvax.ops.softmax_ce.options import Options


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static options; `gauss_newton` leaves out the curvature of the softcap."""

    options: Options
    gauss_newton: bool = False


def weighted(losses: Array, weights: Array) -> Array:
    """`sum(weights * losses)`, where a row of weight 0 counts nothing even if its loss is inf."""
    return row_sums(jnp.where(weights == 0, jnp.zeros_like(losses), weights * losses))


def hessian_products(
    logits: Array, tangents: Array, labels: Array, weights: Array, spec: Spec
) -> Array:
    """Products of tangents `(b, N, V)`; over the capped logits alone if `gauss_newton`."""
    arguments = spec.options.arguments
    cap = arguments["softcap"]
    if cap is None or not spec.gauss_newton:
        return softmax_ce_hvp(logits, tangents, labels, weights, **arguments)
    capped = cap * jnp.tanh(logits / cap)
    slope = (1 - (capped / cap) ** 2)[None]
    arguments["softcap"] = None
    return slope * softmax_ce_hvp(capped, slope * tangents, labels, weights, **arguments)


def _value(spec: Spec, slots: Any, data: Any) -> Array:
    (logits,), (labels, weights) = slots, data
    return weighted(reference.losses(logits, labels, weights, spec.options), weights)


def _gradient(spec: Spec, slots: Any, data: Any) -> tuple[Array, tuple[Array, ...]]:
    (logits,), (labels, weights) = slots, data
    none = zeros_beside(logits, (0, *logits.shape), logits.dtype)
    losses, _, gradient, _ = softmax_ce_triple(
        logits, none, labels, weights, **spec.options.arguments
    )
    return weighted(losses, weights), (gradient,)


def _products(
    spec: Spec, slots: Any, data: Any, tangents: Any, wanted: tuple[bool, ...]
) -> tuple[Array, ...]:
    (logits,), (labels, weights) = slots, data
    return (hessian_products(logits, tangents[0], labels, weights, spec),) if wanted[0] else ()


softmax_ce_total = TwiceDifferentiable(
    ScalarLoss("softmax_cross_entropy", _value, _gradient, _products)
)
