"""The operands of attention as tiles, and the tiles of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from curvax.ops.attention import products
from curvax.ops.attention.options import Masks, Options, allowed
from curvax.ops.attention.tiles import Grid, Kind, Place
from curvax.ops.dtypes import compute_dtype
from curvax.ops.manual_axes import zeros_beside

Slots = Sequence[Array]
Tangents = Sequence[Array | None]
QUERY, KEY, VALUE, BIAS = range(4)
KINDS: tuple[Kind, ...] = ("rows", "columns", "columns", "pairs")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Query, key, value and bias, or a block of their tangents, in whole tiles."""

    grid: Grid
    scale: float
    dtype: jnp.dtype
    parts: tuple[Array | None, ...]

    @classmethod
    def of(cls, grid: Grid, scale: float, parts: Tangents, dtype: jnp.dtype) -> Tiles:
        """Of arrays with a block axis."""
        padded = [
            None if x is None else grid.padded(x, kind)
            for x, kind in zip(parts, KINDS, strict=False)
        ]
        return cls(grid, scale, dtype, (*padded, None)[:4])

    def __call__(self, index: int, at: Place) -> Array | None:
        """A tile of one of them; of the query, scaled."""
        x = self.parts[index]
        if x is None:
            return None
        tile = self.grid.cut(x, KINDS[index], at).astype(self.dtype)
        return self.scale * tile if index == QUERY else tile


class Rows(NamedTuple):
    """What a tile of queries has: the scaled query, the shift and the logarithm of the sum."""

    query: Array
    shift: Array
    log_sum: Array


class Weights(NamedTuple):
    """A tile of P, and the derivatives of the softcap there, None without one."""

    p: Array
    slope: Array | None
    bend: Array | None

    def before(self, ds: Array) -> Array:
        """`f' ds`."""
        return ds if self.slope is None else self.slope * ds


@dataclasses.dataclass(frozen=True)
class Problem:
    """The operands in tiles; `statistics` are the shift and the logarithm of the sum."""

    options: Options
    grid: Grid
    slots: Tiles
    masks: Masks
    statistics: tuple[Array, ...]

    @classmethod
    def of(
        cls, options: Options, masks: Masks, slots: Slots, block: int = 1, kept: Slots = ()
    ) -> Problem:
        """For blocks of so many tangents."""
        grid = Grid.of(options, slots[0], slots[1], block)
        own = Tiles.of(grid, options.scale, [x[None] for x in slots], compute_dtype(slots[0].dtype))
        aligned = (None if x is None else grid.padded(x, "pairs") for x in masks.aligned())
        # Rows that only fill a tile have no weights.
        rows = [
            grid.padded(x[None, ..., None], "rows", fill)
            for x, fill in zip(kept[1:], (0.0, float("inf")), strict=False)
        ]
        return cls(options, grid, own, Masks(*aligned), tuple(rows))

    def tangents(self, x: Tangents) -> Tiles:
        """A block of tangents of the slots."""
        return Tiles.of(self.grid, self.options.scale, x, self.slots.dtype)

    def padded_rows(self, x: Array) -> Array:
        """`(Z, B, T, N, X)`, or `(Z, B, T, N)`, in whole tiles."""
        return self.grid.padded(x if x.ndim == 5 else x[..., None], "rows")

    def zeros(self, *shape: int) -> Array:
        """In the dtype of the computation."""
        query = self.slots.parts[QUERY]
        assert query is not None
        return zeros_beside(query, shape, self.slots.dtype)

    def cut(self, x: Array, at: Place) -> Array:
        """A tile of rows."""
        return self.grid.cut(x, "rows", at).astype(self.slots.dtype)

    def put(self, x: Array, tile: Array, at: Place) -> Array:
        """`x` with a tile of rows put into it."""
        return self.grid.add(x, tile, "rows", at, begin=True)

    def __call__(self, index: int, at: Place) -> Array:
        """A tile of query, key or value."""
        tile = self.slots(index, at)
        assert tile is not None
        return tile

    def rows(self, at: Place) -> Rows:
        """What the weights of a tile of queries need."""
        shift, log_sum = (self.grid.cut(x, "rows", at) for x in self.statistics)
        return Rows(self(QUERY, at), shift, log_sum)

    def logits(self, query: Array, at: Place) -> tuple[Array, Array | None, Array | None]:
        """S, -∞ where a query may not attend, and the derivatives of the softcap."""
        logits, slope, bend = self.options.cap(products.pairs(query, self(KEY, at)))
        bias = self.slots(BIAS, at)
        logits = logits if bias is None else logits + bias
        masks = Masks(*(None if x is None else self.grid.cut(x, "pairs", at) for x in self.masks))
        rows, columns = self.grid.positions(at)
        may = allowed(self.options, masks, rows, columns)
        if self.grid.keys % self.grid.columns:
            real = columns < self.grid.keys
            may = real if may is None else may & real
        return logits if may is None else jnp.where(may, logits, -jnp.inf), slope, bend

    def weights(self, rows: Rows, at: Place) -> Weights:
        """A tile of P, from what was kept of its rows."""
        logits, slope, bend = self.logits(rows.query, at)
        return Weights(jnp.exp(logits - rows.shift - rows.log_sum), slope, bend)


class Sums:
    """Gradients in the slots that are wanted, added up tile by tile from `start`."""

    def __init__(self, problem: Problem, slots: Slots, wanted: Sequence[bool], block: int) -> None:
        self._problem, self._slots = problem, slots
        parts = zip(problem.slots.parts, (*wanted, False)[:4], strict=True)
        self.start = [
            problem.zeros(block, *x.shape[1:]) if flag and x is not None else None
            for x, flag in parts
        ]

    def add(
        self, parts: list[Array | None], index: int, tile: Array | None, at: Place
    ) -> list[Array | None]:
        """With a tile added to one of them; rows of queries come once, and are put there."""
        old = parts[index]
        if old is None or tile is None:
            return parts
        grid, begin = self._problem.grid, index == QUERY
        new = list(parts)
        new[index] = grid.add(old, tile, KINDS[index], at, begin)
        return new

    def finish(self, parts: list[Array | None]) -> tuple[Array, ...]:
        """Those that are wanted, in the dtypes of the slots."""
        trim = self._problem.grid.trimmed
        found = zip(parts, KINDS, self._slots, strict=False)
        return tuple(trim(x, kind).astype(s.dtype) for x, kind, s in found if x is not None)
