"""The sum's arguments, and choice of the implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision, PrecisionLike

from curvax.ops.implementation import resolve
from curvax.ops.matmul_sum import ffi, reference
from curvax.program import default_platform

__all__ = ["matmul_sum"]


def matmul_sum(
    *terms: tuple[Array, Array],
    add_to: Array | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    precision: PrecisionLike = Precision.HIGHEST,
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
        precision: of products of float32 on a device, as for ``jnp.matmul``; a CPU computes in
            float32, and float64 stays.
        impl: ``"auto"``, ``"ffi"`` (compiled kernel) or ``"reference"`` (plain JAX).

    Returns:
        shape ``(batch, m, n)``, or ``(m, n)`` if no operand has a batch axis; dtype of the
        operands, in which sums are accumulated too.

    Raises:
        TypeError: ``impl`` is not a string.
        ValueError: ``impl`` is not a known word.
        RuntimeError: ``impl="ffi"`` without compiled kernels.
    """
    if resolve(impl, "matmul_sum") == "ffi":
        return ffi.matmul_sum(terms, add_to, transpose_a, transpose_b)
    slices = default_platform() == "cpu"
    if slices or terms[0][0].dtype != jnp.float32:
        precision = Precision.HIGHEST
    return reference.matmul_sum(terms, add_to, transpose_a, transpose_b, precision, slices)
