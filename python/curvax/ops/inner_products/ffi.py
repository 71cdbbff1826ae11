"""The compiled kernels, through XLA's foreign-function interface."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from curvax.ops.inner_products.arguments import Pairs, Rows

# (first, begin, count): the products of vector `first` with `count` others from `begin` on.
_Runs = Sequence[tuple[int, int, int]]


def inner_products(a: Rows, b: Rows | None, n: int) -> Array:
    """See `api.inner_products`; of stored rows."""
    k = a.number
    if b is not None:
        runs = [(i, k, b.number) for i in range(k)]
        return _call([a, b], runs, n).reshape(k, b.number)
    upper = _call([a], [(i, i, k - i) for i in range(k)], n)
    place = np.zeros((k, k), np.int64)
    place[np.triu_indices(k)] = np.arange(len(upper))
    return upper[np.maximum(place, place.T)]


def row_products(sets: Sequence[Rows], pairs: Pairs, n: int) -> Array:
    """See `api.row_products`; of stored rows."""
    runs: list[tuple[int, int, int]] = []
    for i, j in np.asarray(pairs).tolist():
        first, begin, count = runs[-1] if runs else (-1, 0, 0)
        if (first, begin + count) == (i, j):
            runs[-1] = first, begin, count + 1
        else:
            runs.append((i, j, 1))
    return _call(sets, runs, n)


def residual_products(
    x: Rows, following: Array, products: Array, shifts: Array, thetas: Array, coupling: Array
) -> Array:
    """See `api.residual_products`; of stored rows."""
    result = jax.ShapeDtypeStruct((len(products), 4), np.float64)
    call = jax.ffi.ffi_call("curvax.residual_products", result, vmap_method="sequential")
    sums: Array = call(x.stored, x.start, following, products, shifts, thetas, coupling)
    return sums


def _call(sets: Sequence[Rows], runs: _Runs, n: int) -> Array:
    counts = np.asarray([rows.number for rows in sets])
    result = jax.ShapeDtypeStruct((sum(count for _, _, count in runs),), np.float64)
    call = jax.ffi.ffi_call("curvax.inner_products", result, vmap_method="sequential")
    operands = [x for rows in sets for x in (rows.stored, rows.start)]
    flat = np.asarray(runs).reshape(-1)
    products: Array = call(*operands, n=np.int64(n), counts=counts, runs=flat)
    return products
