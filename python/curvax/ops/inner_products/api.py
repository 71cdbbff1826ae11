"""Checks of the arguments, and choice of the implementation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64

from curvax.ops.dtypes import check_storage
from curvax.ops.implementation import resolve
from curvax.ops.inner_products import ffi, reference
from curvax.ops.inner_products.arguments import Pairs, Rows

__all__ = ["inner_products", "row_products"]

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
    sets: Sequence[Rows],
    pairs: Pairs,
    n: int,
    coefficients: Float64[Array, "combinations vectors"] | None = None,
    *,
    impl: str = "auto",
) -> Float64[Array, " pairs"]:
    """Inner products of pairs of vectors, or of pairs of their linear combinations, in float64.

    As by `inner_products`; combinations are formed in float64 too, of pieces of the vectors.

    Args:
        sets: one to three sets of rows; their vectors are numbered through.
        pairs: for each product the numbers of two vectors, or of two combinations.
        n: length of the vectors.
        coefficients: shape ``(combinations, vectors)``, float64: combination i is the sum of the
            vectors times row i; the kernel leaves zeros out. None multiplies the vectors.
        impl: as for `inner_products`.

    Returns:
        shape ``(len(pairs),)``, float64.

    Raises:
        TypeError, ValueError, RuntimeError, jax.errors.JaxRuntimeError: as `inner_products`.
    """
    _check(sets, n)
    scales = np.concatenate([np.full(rows.number, rows.scale) for rows in sets])
    module = ffi if resolve(impl, "inner_products") == "ffi" else reference
    if coefficients is None:
        left, right = np.asarray(pairs).T
        return module.row_products(None, sets, pairs, n) / (scales[left] * scales[right])
    if coefficients.ndim != 2 or coefficients.shape[1] != len(scales):
        raise ValueError(
            f"coefficients must have shape (combinations, {len(scales)}), a column for each vector "
            f"of the sets, got {coefficients.shape}"
        )
    if coefficients.dtype != jnp.float64:
        raise ValueError(f"coefficients must be float64, got {coefficients.dtype}")
    return module.row_products(coefficients / scales[None], sets, pairs, n)


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
