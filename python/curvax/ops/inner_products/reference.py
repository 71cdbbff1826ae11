"""The same in plain JAX, for any platform and as the yardstick of the kernel.

Pieces of the rows, widened to float64, are all that is held of them beside what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from curvax.columns import matmul, over_columns, row_sums
from curvax.ops.inner_products.arguments import Pairs, Rows


def inner_products(a: Rows, b: Rows | None, n: int) -> Array:
    """See `api.inner_products`; of stored rows."""
    sets = [a] if b is None else [a, b]

    def add(total: Array, first: Array, width: int) -> Array:
        pieces = _pieces(sets, first, width)
        return total + matmul(pieces[0], pieces[-1].T)

    counts = [rows.number for rows in sets]
    return over_columns(add, jnp.zeros((counts[0], counts[-1])), n, rows=sum(counts))


def row_products(coefficients: Array | None, sets: Sequence[Rows], pairs: Pairs, n: int) -> Array:
    """See `api.row_products`; of stored rows."""
    left, right = np.asarray(pairs).T

    def add(total: Array, first: Array, width: int) -> Array:
        vectors = jnp.concatenate(_pieces(sets, first, width))
        if coefficients is not None:
            vectors = matmul(coefficients, vectors)
        return total + row_sums(vectors[left] * vectors[right])

    rows = sum(rows.number for rows in sets) + (0 if coefficients is None else len(coefficients))
    return over_columns(add, jnp.zeros(len(pairs)), n, rows=rows + len(pairs))


def _pieces(sets: Sequence[Rows], first: Array, width: int) -> list[Array]:
    """Some columns of each set of rows, in float64."""
    pieces = []
    for stored, start, count, _ in sets:
        # XLA:CPU slices bfloat16 after widening it, and would hoist a wide copy of all rows out of
        # the loop over the columns. One slice after another, or it widens for all sets at once.
        stored, first = lax.optimization_barrier((stored, first))
        piece = lax.dynamic_slice(stored, (start.astype(first.dtype), first), (count, width))
        piece, first = lax.optimization_barrier((piece, first))
        pieces.append(piece.astype(jnp.float64))
    return pieces
