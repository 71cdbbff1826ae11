"""Convolutions with the axes in the order that XLA:CPU computes fast.

XLA:CPU brings convolutions into that order by itself, but not those in loops, which it then
computes by plain loops, at a ninth of the speed. In a loop over microbatches all are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from curvax.jax_internals import Jaxpr, JaxprEqn, convolution_axes, with_convolution_axes
from curvax.jaxprs import Body, inlined


def in_fast_order(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with the axes of its own convolutions as batch, space and features."""
    return inlined(jaxpr, _body) if any(map(convolution_axes, jaxpr.eqns)) else jaxpr


def _body(eqn: JaxprEqn, operands: list[Any]) -> Body | None:
    axes = convolution_axes(eqn)
    if axes is None:
        return None
    lhs, rhs, out = axes
    rank = len(lhs)
    space = range(1, rank - 1)
    # The place of each axis: batch and features, or features out and in; then those of space.
    batch_last, weights = (0, rank - 1, *space), (rank - 1, rank - 2, *range(rank - 2))
    wanted = batch_last, weights, batch_last
    if axes == wanted:
        return None

    def reordered(x: Array, y: Array) -> Array:
        x, y = jnp.transpose(x, _moves(lhs, batch_last)), jnp.transpose(y, _moves(rhs, weights))
        result = eqn.primitive.bind(x, y, **with_convolution_axes(eqn, wanted))
        return jnp.transpose(result, _moves(batch_last, out))

    avals: list[Any] = [var.aval for var in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return jax.make_jaxpr(reordered)(*shapes).jaxpr, operands


def _moves(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that brings each axis from its old to its new place."""
    source = dict(zip(new, old, strict=True))
    return tuple(source[place] for place in range(len(new)))
