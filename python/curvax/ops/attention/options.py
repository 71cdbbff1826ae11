"""The options of attention, and which keys a query may attend to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from curvax.typing import DTypeLike

__all__ = ["Masks", "Options", "allowed"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Constants of attention.

    Attributes:
        scale: factor of the products of queries and keys.
        softcap: cap c of the scaled products u, `c tanh(u / c)`, before the bias; None for none.
        is_causal: whether query t attends to keys up to t alone.
        window: (left, right): query t attends to keys from t - left to t + right; None for all.
    """

    scale: float
    softcap: float | None = None
    is_causal: bool = False
    window: tuple[int, int] | None = None

    def check_range(self, dtype: DTypeLike) -> None:
        """Refuse a softcap that a computation in `dtype` has no numbers for.

        Raises:
            ValueError: one of which 2/c² is infinite, or by which eps, divided, is not normal.
        """
        info, cap = jnp.finfo(dtype), self.softcap
        low, high = float(info.tiny) ** 0.5, float(info.eps / info.tiny)
        if cap is not None and not low <= cap <= high:
            raise ValueError(
                f"softcap must be in [{low:.2g}, {high:.2g}] for a computation in "
                f"{jnp.dtype(dtype)}, got {cap:g}: a softcap far above all logits is None"
            )

    def cap(self, u: Array) -> tuple[Array, Array | None, Array | None]:
        """The capped logits with their first and second derivative, None without a cap."""
        if self.softcap is None:
            return u, None, None
        capped = self.softcap * jnp.tanh(u / self.softcap)
        slope = 1 - (capped / self.softcap) ** 2
        return capped, slope, -2 / self.softcap**2 * capped * slope

    def bounds(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """The range `[low, high)` of keys that any query from `first` to `last` may attend to."""
        left, right = self.window or (first, keys)
        right = min(right, 0) if self.is_causal else right
        return max(first - left, 0), min(last + right + 1, keys)


class Masks(NamedTuple):
    """What of the masks is known only at run time; None is everything.

    Every array has the batch's leading axis, of its size or 1.

    Attributes:
        mask: `(B, N, T, S)` bool, true where a query may attend; any axis may be 1.
        query_lengths: `(B,)` int32: queries from there on attend to nothing.
        key_lengths: `(B,)` int32: keys from there on are attended to by none.
        query_segments: `(B, T)` int32: queries attend to keys of the same segment.
        key_segments: `(B, S)` int32.
    """

    mask: Array | None
    query_lengths: Array | None
    key_lengths: Array | None
    query_segments: Array | None
    key_segments: Array | None

    def aligned(self) -> Masks:
        """The same, each with the axes `(1, B, N, T, S)`, where 1 stands for any size."""
        mask, q_lengths, k_lengths, q_segments, k_segments = self
        return Masks(
            None if mask is None else mask[None],
            None if q_lengths is None else q_lengths[None, :, None, None, None],
            None if k_lengths is None else k_lengths[None, :, None, None, None],
            None if q_segments is None else q_segments[None, :, None, :, None],
            None if k_segments is None else k_segments[None, :, None, None, :],
        )


def allowed(options: Options, masks: Masks, rows: Array, columns: Array) -> Array | None:
    """Whether a query may attend to a key; None if each may to all.

    Args:
        options: the causal mask and the window.
        masks: whose arrays broadcast against `rows` and `columns`.
        rows: int32 positions of queries.
        columns: int32 positions of keys.
    """
    terms: list[Array] = [] if masks.mask is None else [masks.mask]
    if options.is_causal:
        terms.append(columns <= rows)
    if options.window is not None:
        terms += [columns >= rows - options.window[0], columns <= rows + options.window[1]]
    if masks.query_lengths is not None:
        terms.append(rows < masks.query_lengths)
    if masks.key_lengths is not None:
        terms.append(columns < masks.key_lengths)
    if masks.query_segments is not None and masks.key_segments is not None:
        terms.append(masks.query_segments == masks.key_segments)
    return _all_of(terms)


def _all_of(terms: Sequence[Array]) -> Array | None:
    total: Array | None = None
    for term in terms:
        total = term if total is None else total & term
    return total
