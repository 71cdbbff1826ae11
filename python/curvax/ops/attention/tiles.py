"""Tiles of the arrays of attention, and the loops over them.

Arrays come with a leading block axis Z of tangents, of size 1 for what is no tangent:

    rows     (Z, B, T, N, X)   of queries, X numbers each: queries, outputs, statistics
    columns  (Z, B, S, K, X)   of keys: keys, values
    pairs    (Z, B, N, T, S)   biases and masks, where B, N, T or S may be 1 for any

A tile of some of the batch and of the K heads of keys, each with its G = N / K heads of queries, is
arranged for products of matrices, which a batch of (B, K) has:

    rows     (B, K, Z, G, t, X)        columns  (B, K, Z, s, X)        pairs  (B, K, Z, G, t, s)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from curvax.ops.attention.options import Options
from curvax.program import default_platform

Kind = Literal["rows", "columns", "pairs"]
Index = int | Array
C = TypeVar("C")

# The most rows or columns of a tile, and the numbers in all tiles of pairs that exist at once.
_ON_CPU = (256, 1 << 20)
_ON_DEVICE = (1024, 1 << 24)


class Place(NamedTuple):
    """Which tile: of the batch, of the heads, of queries, of keys."""

    batch: Index
    heads: Index
    row: Index
    column: Index


@dataclasses.dataclass(frozen=True)
class Grid:
    """The sizes of tiles, and which there are.

    Attributes:
        group: G, heads of queries for one of keys.
        batch: the batch in a tile, and so on.
        heads: heads of keys.
        rows: queries.
        columns: keys.
        counts: the number of tiles along each of the four.
        ranges: `(2, tiles of queries)`: the tiles of keys, from and to, that one of queries meets.
        queries: T.
        keys: S.
    """

    group: int
    batch: int
    heads: int
    rows: int
    columns: int
    counts: tuple[int, int, int, int]
    ranges: np.ndarray
    queries: int
    keys: int

    @classmethod
    def of(cls, options: Options, query: Array, key: Array, block: int) -> Grid:
        """For arrays `(B, T, N, H)` and `(B, S, K, H)`, and blocks of so many tangents."""
        batch, queries, heads, _ = query.shape
        keys, of_keys = key.shape[1:3]
        side, budget = _ON_CPU if default_platform() == "cpu" else _ON_DEVICE
        group = heads // of_keys
        rows, columns = _near(queries, side), _near(keys, side)
        room = budget // max(block * group * rows * columns, 1)
        some_heads = _divisor(of_keys, room)
        some_batch = _divisor(batch, room // of_keys)
        counts = (
            batch // some_batch,
            of_keys // some_heads,
            -(-queries // rows),
            -(-keys // columns),
        )
        ranges = np.zeros((2, counts[2]), np.int32)
        for i in range(counts[2]):
            last = min((i + 1) * rows, queries) - 1
            low, high = options.bounds(i * rows, last, keys)
            if low < high:
                ranges[:, i] = low // columns, -(-high // columns)
        return cls(group, some_batch, some_heads, rows, columns, counts, ranges, queries, keys)

    @staticmethod
    def block(group: int, queries: int, keys: int) -> int:
        """The most tangents of a block whose tiles are within bounds."""
        side, budget = _ON_CPU if default_platform() == "cpu" else _ON_DEVICE
        return max(4 * budget // (group * _near(queries, side) * _near(keys, side)), 1)

    def padded(self, x: Array, kind: Kind, fill: float = 0.0) -> Array:
        """`x` with whole tiles of queries and keys."""
        widths = [(0, 0)] * 5
        for axis, size, whole in self._long(kind):
            if x.shape[axis] == size:
                widths[axis] = (0, whole - size)
        return jnp.pad(x, widths, constant_values=fill) if any(w[1] for w in widths) else x

    def trimmed(self, x: Array, kind: Kind) -> Array:
        """The inverse of `padded`."""
        for axis, size, whole in self._long(kind):
            if x.shape[axis] == whole != size:
                x = lax.slice_in_dim(x, 0, size, axis=axis)
        return x

    def _long(self, kind: Kind) -> list[tuple[int, int, int]]:
        """The axes along queries or keys, their sizes, and these with whole tiles."""
        row = (self.queries, self.rows * self.counts[2])
        column = (self.keys, self.columns * self.counts[3])
        if kind == "pairs":
            return [(3, *row), (4, *column)]
        return [(2, *(row if kind == "rows" else column))]

    def _window(self, x: Array, kind: Kind, at: Place) -> tuple[list[Array], list[int]]:
        """Where in an array a tile begins, and its size; an axis of 1 is there for all tiles."""
        heads = self.heads * (1 if kind == "columns" else self.group)
        steps = [(0, x.shape[0]), (at.batch, self.batch)]
        row, column = (at.row, self.rows), (at.column, self.columns)
        if kind == "pairs":
            steps += [(at.heads, heads), row, column]
        else:
            steps += [row if kind == "rows" else column, (at.heads, heads), (0, x.shape[4])]
        starts, sizes = [], []
        for (index, step), size in zip(steps, x.shape, strict=True):
            starts.append(jnp.int32(0) if size == 1 else jnp.int32(index * step))
            sizes.append(min(step, size))
        return starts, sizes

    def cut(self, x: Array, kind: Kind, at: Place) -> Array:
        """A tile, arranged."""
        starts, sizes = self._window(x, kind, at)
        tile = x if tuple(sizes) == x.shape else lax.dynamic_slice(x, starts, sizes)
        if kind == "columns":
            return tile.transpose(1, 3, 0, 2, 4)
        if kind == "rows":
            z, b, t, n, width = tile.shape
            return tile.reshape(z, b, t, -1, self.group, width).transpose(1, 3, 0, 4, 2, 5)
        z, b, n, t, s = tile.shape
        heads = (1, 1) if n == 1 else (n // self.group, self.group)
        return tile.reshape(z, b, *heads, t, s).transpose(1, 2, 0, 3, 4, 5)

    def add(self, x: Array, tile: Array, kind: Kind, at: Place, begin: bool = False) -> Array:
        """`x` with an arranged tile added to it, or put into it if it is the first there."""
        starts, sizes = self._window(x, kind, at)
        if kind == "columns":
            tile = tile.transpose(2, 0, 3, 1, 4)
        elif kind == "rows":
            tile = tile.transpose(2, 0, 4, 1, 3, 5).reshape(sizes)
        else:
            tile = self._summed(tile.transpose(2, 0, 1, 3, 4, 5), sizes)
        tile = tile.astype(x.dtype)
        if not begin:
            tile = lax.dynamic_slice(x, starts, sizes) + tile
        return lax.dynamic_update_slice(x, tile, starts)

    @staticmethod
    def _summed(tile: Array, sizes: list[int]) -> Array:
        """A tile of pairs, summed over what an array has once."""
        tile = tile.reshape(*tile.shape[:2], -1, *tile.shape[4:])
        axes = [d for d, size in enumerate(sizes) if size == 1 < tile.shape[d]]
        return jnp.sum(tile, axis=axes, keepdims=True) if axes else tile

    def positions(self, at: Place) -> tuple[Array, Array]:
        """Those of the queries and of the keys of a tile, `(1, 1, 1, 1, t, 1)` and `(..., s)`."""
        rows = jnp.arange(self.rows, dtype=jnp.int32)[None, None, None, None, :, None]
        columns = jnp.arange(self.columns, dtype=jnp.int32)[None, None, None, None, None, :]
        return rows + jnp.int32(at.row * self.rows), columns + jnp.int32(at.column * self.columns)

    def over_rows(self, body: Callable[[Place, C], C], start: C) -> C:
        """Fold over batch, heads and tiles of queries."""
        sizes = self.counts[:3]

        def step(n: Index, carry: C) -> C:
            row, rest = n % sizes[2], n // sizes[2]
            return body(Place(rest // sizes[1], rest % sizes[1], row, 0), carry)

        return _loop(0, math.prod(sizes), step, start)

    def over_columns(self, at: Place, body: Callable[[Place, C], C], start: C) -> C:
        """Fold over the tiles of keys that a tile of queries meets."""
        first, last = (np.unique(ends) for ends in self.ranges)
        low, high = (
            int(ends[0]) if len(ends) == 1 else jnp.asarray(own)[at.row]
            for ends, own in zip((first, last), self.ranges, strict=True)
        )
        return _loop(low, high, lambda j, carry: body(at._replace(column=j), carry), start)


def _loop(low: Index, high: Index, body: Callable[[Index, C], C], start: C) -> C:
    """A loop that is none where its bounds are known and it runs once."""
    if isinstance(low, int) and isinstance(high, int) and high - low <= 1:
        return body(low, start) if high > low else start
    return lax.fori_loop(jnp.int32(low), jnp.int32(high), body, start)


def _near(size: int, most: int) -> int:
    """The size of equal tiles of at most so much, the last of which may be shorter."""
    count = max(-(-size // most), 1)
    return max(-(-size // count), 1)


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most so much, or 1."""
    return max((d for d in range(1, size + 1) if size % d == 0 and d <= most), default=1)
