"""The same in plain JAX, for any platform and as the yardstick of the kernel.

Pieces of the rows, widened to float64, are all that is held of them beside what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
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


def row_products(sets: Sequence[Rows], pairs: Pairs, n: int) -> Array:
    """See `api.row_products`; of stored rows."""

    def add(total: Array, first: Array, width: int) -> Array:
        rows = [row for piece in _pieces(sets, first, width) for row in piece]
        return total + jnp.stack([row_sums(rows[i] * rows[j]) for i, j in pairs])

    return over_columns(add, jnp.zeros(len(pairs)), n, rows=2 * len(pairs))


def residual_products(
    x: Rows, following: Array, products: Array, shifts: Array, thetas: Array, coupling: Array
) -> Array:
    """See `api.residual_products`; of stored rows."""
    b, n = products.shape
    sets = [x, x._replace(start=following), Rows.all_of(products)]

    def add(total: Array, first: Array, width: int) -> Array:
        x, q, w = _pieces(sets, first, width)
        rest = w - shifts[:, None] * x
        error = w - thetas[:, None] * x - matmul(coupling.T, q)
        squares = [row_sums(u * v) for u, v in ((x, x), (x, rest), (rest, rest), (error, error))]
        return total + jnp.stack(squares, axis=1)

    return over_columns(add, jnp.zeros((b, 4)), n, rows=7 * b)


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
