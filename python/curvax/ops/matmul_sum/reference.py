"""The sum in plain JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.lax import PrecisionLike

# Elements of a slice of a sum, on a CPU.
_SLICE = 1 << 20


def matmul_sum(
    terms: Sequence[tuple[Array, Array]],
    add_to: Array | None,
    transpose_a: bool,
    transpose_b: bool,
    precision: PrecisionLike,
    slices: bool,
) -> Array:
    """The sum, later terms added to it, with `slices` one after another.

    XLA:CPU would make an array of a whole product; elsewhere a library's product adds in place.
    """
    total = add_to
    for a, b in terms:
        product = _Product(a, b, transpose_a, transpose_b, precision)
        if total is None:
            total = product.whole()
        else:
            total = product.add_to(total) if slices else total + product.whole()
    assert total is not None
    return total


class _Product(NamedTuple):
    """One term."""

    a: Array
    b: Array
    transpose_a: bool
    transpose_b: bool
    precision: PrecisionLike

    def whole(self) -> Array:
        a = self.a.mT if self.transpose_a else self.a
        b = self.b.mT if self.transpose_b else self.b
        return jnp.matmul(a, b, precision=self.precision)

    def part(self, axis: int, start: Array, size: int) -> Array:
        """Rows (axis -2) or columns (axis -1) of the product; cut before any transposition."""
        if axis == -2:
            stored = -1 if self.transpose_a else -2
            return self._replace(a=_cut(self.a, stored, start, size)).whole()
        stored = -2 if self.transpose_b else -1
        return self._replace(b=_cut(self.b, stored, start, size)).whole()

    def add_to(self, total: Array) -> Array:
        """`total + a @ b`, by slices in place."""
        if total.size == 0:
            return total
        axis = -2 if total.shape[-2] > total.shape[-1] else -1
        length = total.shape[axis]
        size = min(length, max(_SLICE * length // total.size, 1))

        def step(total: Array, start: Array, size: int) -> Array:
            new = _cut(total, axis, start, size) + self.part(axis, start, size)
            return lax.dynamic_update_slice_in_dim(total, new, start, total.ndim + axis)

        slices = length // size
        if rest := length - slices * size:
            # Before the loop: after it, XLA would copy what the loop has updated in place.
            total = step(total, jnp.int32(slices * size), rest)
        return lax.fori_loop(
            jnp.int32(0), jnp.int32(slices), lambda i, total: step(total, i * size, size), total
        )


def _cut(x: Array, axis: int, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, x.ndim + axis)
