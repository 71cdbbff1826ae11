"""Checks of the arguments, and choice of the implementation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Float64

from curvax.ops.dtypes import check_storage, compute_dtype
from curvax.ops.implementation import resolve
from curvax.ops.inner_products import ffi, reference
from curvax.ops.inner_products.arguments import Pairs, Rows

__all__ = ["inner_products", "residual_products", "row_products"]

_MAX_SETS = 3


def inner_products(
    a: Rows, b: Rows | None, n: int, *, impl: str = "auto"
) -> Float64[Array, "a_number b_number"]:
    """Inner products of all vectors of a set with all of another: ``A Bᵀ`` in float64.

    Products and sums are in float64, whatever the rows are stored in, so that those of float32 and
    of 16 bits have no rounding but that of the sum. Sums have the same bits for any number of
    threads. The kernel reads each row from memory once; it needs no widened copy.

    Args:
        a: a set of rows.
        b: another, or None for ``A Aᵀ``, which is then exactly symmetric.
        n: length of the vectors; columns from there on are not read.
        impl: ``"auto"``, ``"ffi"`` (compiled kernel of the CPU) or ``"reference"`` (plain JAX).

    Returns:
        shape ``(a.number, b.number)``, float64.

    Raises:
        TypeError: `impl` is not a string.
        ValueError: a shape, dtype or word is wrong, or 64-bit numbers are off: call this under
            ``jax.enable_x64(True)``.
        RuntimeError: ``impl="ffi"`` without compiled kernels.
        jax.errors.JaxRuntimeError: rows beyond the last one at run time (kernel alone).
    """
    _check([a] if b is None else [a, b], n)
    module = ffi if resolve(impl, "inner_products") == "ffi" else reference
    return module.inner_products(a, b, n) / (a.scale * (a if b is None else b).scale)


def row_products(
    sets: Sequence[Rows], pairs: Pairs, n: int, *, impl: str = "auto"
) -> Float64[Array, " pairs"]:
    """Inner products of pairs of vectors, in float64, as by `inner_products`.

    Args:
        sets: one to three sets of rows; their vectors are numbered through.
        pairs: for each product the numbers of two vectors.
        n: length of the vectors.
        impl: as for `inner_products`.

    Returns:
        shape ``(len(pairs),)``, float64.

    Raises:
        TypeError, ValueError, RuntimeError, jax.errors.JaxRuntimeError: as `inner_products`.
    """
    _check(sets, n)
    scales = np.concatenate([np.full(rows.number, rows.scale) for rows in sets])
    left, right = np.asarray(pairs).T
    module = ffi if resolve(impl, "inner_products") == "ffi" else reference
    return module.row_products(sets, pairs, n) / (scales[left] * scales[right])


def residual_products(
    x: Rows,
    following: Array,
    products: Float[Array, "b n"],
    shifts: Float64[Array, " b"],
    thetas: Float64[Array, " b"],
    coupling: Float64[Array, "b b"],
    *,
    impl: str = "auto",
) -> Float64[Array, "b 4"]:
    """Of every vector x and its product w the sums of which a residual is made, in float64.

    With ``r = w - σ x`` and ``e = w - θ x - couplingᵀ q``, elements in float64 too: ``‖x‖²``,
    ``xᵀr``, ``‖r‖²`` and ``‖e‖²``. The kernel reads everything once.

    Args:
        x: b rows of a basis.
        following: int32 scalar, the first of b rows q of the same basis; rows that only have zeros
            in the coupling are not read by the kernel.
        products: shape ``(b, n)``, w; float64 for a basis in float64, else float32.
        shifts: shape ``(b,)``, σ.
        thetas: shape ``(b,)``, θ.
        coupling: shape ``(b, b)``.
        impl: as for `inner_products`.

    Returns:
        shape ``(b, 4)``, float64.

    Raises:
        TypeError, ValueError, RuntimeError, jax.errors.JaxRuntimeError: as `inner_products`.
    """
    b, n = products.shape
    _check([x, Rows.all_of(products)], n)
    if b != x.number or products.dtype != compute_dtype(x.stored.dtype):
        raise ValueError(
            f"products must be {x.number} rows in {compute_dtype(x.stored.dtype)}, one for each x, "
            f"got {b} rows in {products.dtype}"
        )
    module = ffi if resolve(impl, "residual_products") == "ffi" else reference
    scale = x.scale
    factors = (factor / scale for factor in (shifts, thetas, coupling))
    sums = module.residual_products(x, following, products, *factors)
    return sums / np.asarray([[scale**2, scale, 1, 1]])


def _check(sets: Sequence[Rows], n: int) -> None:
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError(
            "inner products are float64: call this under jax.enable_x64(True), got 64-bit "
            "numbers turned off"
        )
    if not 1 <= len(sets) <= _MAX_SETS:
        raise ValueError(f"sets must be one to {_MAX_SETS} sets of rows, got {len(sets)}")
    for i, (stored, _, count, _) in enumerate(sets):
        check_storage(f"set {i} of the rows", stored.dtype)
        if stored.ndim != 2 or not 1 <= count <= stored.shape[0] or not 1 <= n <= stored.shape[1]:
            raise ValueError(
                f"set {i} must be at least one row, and at most all, of a matrix with n = {n} "
                f"columns or more, got {count} rows of shape {stored.shape}"
            )
