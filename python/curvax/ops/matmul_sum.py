"""Sums of matrix products, `[c +] a_1 b_1 + a_2 b_2`, with no copy of an operand or of `c`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from curvax.ops.implementation import resolve
from curvax.ops.manual_axes import vary, varying

__all__ = ["matmul_sum"]

# Elements of a slice of a sum, in the plain form.
_SLICE = 1 << 20


def matmul_sum(
    *terms: tuple[Array, Array],
    add_to: Array | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    impl: str = "auto",
) -> Array:
    """Computes ``add_to + a_1 @ b_1 + a_2 @ b_2``.

    XLA would make an array of each product before it adds it, or of operands set side by side:
    where ``add_to`` is the gradient of a language model's head, gigabytes.

    Args:
        terms: one or two pairs ``(a, b)`` of shapes ``(m, k)`` and ``(k, n)``, each with or without
            a leading batch axis; float32 or float64.
        add_to: of the result's shape, or None; donate it: the kernel adds in place.
        transpose_a: swap the last two axes of every ``a``.
        transpose_b: swap the last two axes of every ``b``.
        impl: ``"auto"``, ``"ffi"`` (compiled kernel) or ``"reference"`` (plain JAX).

    Returns:
        shape ``(batch, m, n)``, or ``(m, n)`` if no operand has a batch axis; dtype of the
        operands, in which sums are accumulated too.
    """
    if resolve("matmul_sum", impl) == "ffi":
        return _ffi(terms, add_to, transpose_a, transpose_b)
    total = add_to
    for a, b in terms:
        product = _Product(a, b, transpose_a, transpose_b)
        total = product.whole() if total is None else product.add_to(total)
    assert total is not None
    return total


class _Product(NamedTuple):
    """A product of one term, in plain JAX."""

    a: Array
    b: Array
    transpose_a: bool
    transpose_b: bool

    def whole(self) -> Array:
        a = self.a.mT if self.transpose_a else self.a
        b = self.b.mT if self.transpose_b else self.b
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def part(self, axis: int, start: Array, size: int) -> Array:
        """Rows (axis -2) or columns (axis -1) of the product; cut before any transposition."""
        if axis == -2:
            stored = -1 if self.transpose_a else -2
            return self._replace(a=_cut(self.a, stored, start, size)).whole()
        stored = -2 if self.transpose_b else -1
        return self._replace(b=_cut(self.b, stored, start, size)).whole()

    def add_to(self, total: Array) -> Array:
        """`total + a @ b`, by slices in place: XLA would make an array of the whole product."""
        axis = -2 if total.shape[-2] > total.shape[-1] else -1
        length = total.shape[axis]
        size = min(length, max(_SLICE * length // max(total.size, 1), 1))

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


def _ffi(
    terms: Sequence[tuple[Array, Array]], add_to: Array | None, transpose_a: bool, transpose_b: bool
) -> Array:
    operands = [x for term in terms for x in term]
    a, b = terms[0]
    batch = next((x.shape[:1] for x in operands if x.ndim == 3), ())
    shape = (*batch, a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1])
    aliases = {}
    if add_to is not None:
        aliases = {len(operands): 0}
        operands.append(add_to)
    call = jax.ffi.ffi_call(
        "curvax.matmul_sum",
        jax.ShapeDtypeStruct(shape, a.dtype),
        vmap_method="sequential",
        input_output_aliases=aliases,
    )
    out = call(*operands, transpose_a=transpose_a, transpose_b=transpose_b)
    return vary(out, varying(*operands))
