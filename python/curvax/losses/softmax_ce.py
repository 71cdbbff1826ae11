"""Cross entropies of rows of logits: their weighted sum, and labels drawn from their softmax.

The sum is a twice differentiable scalar. Its slot is the logits `(N, V)`; the data are the labels
`(N,)`, int32, and the weights `(N,)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from curvax.columns import row_sums
from curvax.ops import softmax_ce
from curvax.ops.dtypes import compute_dtype
from curvax.ops.manual_axes import zeros_beside
from curvax.ops.softmax_ce import Options
from curvax.second_order import ScalarLoss, TwiceDifferentiable


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
    options = spec.options
    capped, slope = softmax_ce.cap(logits, options.softcap)
    if slope is None or not spec.gauss_newton:
        return softmax_ce.hvp(logits, tangents, labels, weights, options)
    uncapped = dataclasses.replace(options, softcap=None)
    slope = slope[None]
    return slope * softmax_ce.hvp(capped, slope * tangents, labels, weights, uncapped)


def _value(spec: Spec, slots: Any, data: Any) -> Array:
    (logits,), (labels, weights) = slots, data
    return weighted(softmax_ce.losses(logits, labels, weights, spec.options), weights)


def _gradient(spec: Spec, slots: Any, data: Any) -> tuple[Array, tuple[Array, ...]]:
    (logits,), (labels, weights) = slots, data
    none = zeros_beside(logits, (0, *logits.shape), logits.dtype)
    losses, _, gradient, _ = softmax_ce.derivatives(logits, none, labels, weights, spec.options)
    return weighted(losses, weights), (gradient,)


def _products(
    spec: Spec, slots: Any, data: Any, tangents: Any, wanted: tuple[bool, ...]
) -> tuple[Array, ...]:
    (logits,), (labels, weights) = slots, data
    return (hessian_products(logits, tangents[0], labels, weights, spec),) if wanted[0] else ()


softmax_ce_total = TwiceDifferentiable(
    ScalarLoss("softmax_cross_entropy", _value, _gradient, _products)
)


def draw_labels(logits: Array, labels: Array, keys: Array, options: Options) -> Array:
    """One label per row, of probability `softmax(z)`, `z` the logits after the cap.

    The largest of `z` plus independent Gumbel noise has these probabilities (Maddison et al. 2014,
    "A* sampling", section 2).

    Args:
        logits: `(N, V)`.
        labels: `(N,)` int32; a row whose label is to be ignored keeps it.
        keys: `(N,)` keys: a row's label depends on its own alone.
        options: their softcap and `ignore_index` count.
    """
    dtype = compute_dtype(logits.dtype)
    z, _ = softmax_ce.cap(logits.astype(dtype), options.softcap)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, z.shape[1:], dtype))(keys)
    drawn = jnp.argmax(z + noise, axis=1).astype(labels.dtype)
    return jnp.where(labels == options.ignore_index, labels, drawn)
