"""Products of arranged tiles, in full precision: rows, columns and pairs as `tiles` says.

Z is the number of tangents, or 1 for what all tangents share. No tile of pairs is copied or laid
out anew: a tile of rows or columns is, where it must be.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def _product(text: str, a: Array, b: Array) -> Array:
    return jnp.einsum(text, a, b, precision="highest")


def _for_each(x: Array, block: int) -> Array:
    return jnp.broadcast_to(x, (*x.shape[:2], block, *x.shape[3:]))


def pairs(rows: Array, columns: Array) -> Array:
    """`rows @ columnsᵀ`, pairs."""
    if columns.shape[2] == 1:
        return _product("bkzgtx,bksx->bkzgts", rows, columns[:, :, 0])
    return _product("bkzgtx,bkzsx->bkzgts", _for_each(rows, columns.shape[2]), columns)


def sum_of_pairs(*terms: tuple[Array | None, Array | None]) -> Array | None:
    """The sum of `rows @ columnsᵀ`, of terms of which neither is None; None of no term."""
    known = [(a, b) for a, b in terms if a is not None and b is not None]
    if not known:
        return None
    if len(known) == 1:
        return pairs(*known[0])
    block = max(x.shape[2] for term in known for x in term)
    # One product of long rows, in place of a sum of arrays of pairs.
    long = (jnp.concatenate([_for_each(x, block) for x in f], -1) for f in zip(*known, strict=True))
    return pairs(*long)


def rows(tile: Array, columns: Array) -> Array:
    """`pairs @ columns`, rows."""
    if columns.shape[2] == 1:
        return _product("bkzgts,bksx->bkzgtx", tile, columns[:, :, 0])
    if tile.shape[2] == 1:
        return _product("bkgts,bkzsx->bkzgtx", tile[:, :, 0], columns)
    return _product("bkzgts,bkzsx->bkzgtx", tile, columns)


def columns(tile: Array, rows: Array) -> Array:
    """`pairsᵀ @ rows`, columns."""
    if tile.shape[2] == 1 < rows.shape[2]:
        return _product("bkgts,bkzgtx->bkzsx", tile[:, :, 0], rows)
    return _product("bkzgts,bkzgtx->bkzsx", tile, _for_each(rows, tile.shape[2]))


def total(*terms: Array | None) -> Array | None:
    """The sum of those that are there; None of none."""
    known = [x for x in terms if x is not None]
    return sum(known[1:], known[0]) if known else None
