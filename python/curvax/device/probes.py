"""Random vectors: row i of an endless sequence, which depends on the seed and on i alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from curvax.checks import seed_word
from curvax.columns import over_columns, random_columns, row_sums
from curvax.operators.base import Operator
from curvax.program import Clock, Program

DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")


def draw(
    clock: Clock, op: Operator, like: Array, seed: int, first: int, distribution: str
) -> Array:
    """Draw independent vectors of mean 0 and covariance I.

    Args:
        clock: charged for the compilation.
        op: gives n and the dtype.
        like: an array as long as the block.
        seed: the low 32 bits count.
        first: the row of the sequence that comes first, below 2³².
        distribution: `"rademacher"` (entries ±1), `"gaussian"`, or `"sphere"` (uniform on the
            sphere of radius √n).

    Returns:
        `(b, n)`, the rows `first` to `first + b − 1`. It and scratch of b · 65536 numbers (on a
        device, of as many as a step of `over_columns` takes) are all that is allocated.
    """
    block = _Block(like.shape[0], op.shape[0], op.dtype)
    return _PROGRAMS[distribution](clock, block, seed_word(seed), np.uint32(first))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Block:
    """All that a program depends on: operators of one dimension share it."""

    count: int
    n: int
    dtype: np.dtype[Any]


def columns(
    seed: Array, rows: Array, first: Array, width: int, dtype: Any, distribution: str
) -> Array:
    """The columns `first` to `first + width − 1` of some rows, inside a compiled program.

    `first` is a multiple of `CHUNK`. The rows of `"sphere"` are not normalised: they are those of
    `"gaussian"`.
    """
    # The generator is named: under another, a row could depend on those drawn with it.
    key = jax.random.key(seed, impl="threefry2x32")
    fill = _signs if distribution == "rademacher" else jax.random.normal

    def one(row: Array) -> Array:
        own = jax.random.fold_in(key, row)
        return random_columns(lambda k, w: fill(k, (w,), dtype), own, first, width)

    return jax.vmap(one)(rows)


def _signs(key: Array, shape: tuple[int], dtype: Any) -> Array:
    """±1 from single bits: 32 entries for each word of the generator."""
    words = jax.random.bits(key, (-(-shape[0] // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None, :]) & jnp.uint32(1)
    return 1 - 2 * bits.reshape(-1)[: shape[0]].astype(dtype)


def _fill(distribution: str, block: _Block, seed: Array, first: Array) -> Array:
    b, n, dtype = block.count, block.n, block.dtype
    rows = first + jnp.arange(b, dtype=jnp.uint32)

    def fill(carry: tuple[Array, Array], start: Array, width: int) -> tuple[Array, Array]:
        drawn, squares = carry
        piece = columns(seed, rows, start, width, dtype, distribution)
        squares += row_sums(piece.astype(jnp.float64) ** 2)
        return lax.dynamic_update_slice_in_dim(drawn, piece, start, axis=1), squares

    empty = jnp.zeros((b, n), dtype), jnp.zeros(b, jnp.float64)
    drawn, squares = over_columns(fill, empty, n, rows=3 * b)
    if distribution != "sphere":
        return drawn
    return drawn * jnp.sqrt(n / squares).astype(dtype)[:, None]


# In 64-bit mode, so that the lengths are those of the rows whatever is drawn beside them.
_PROGRAMS: dict[str, Callable[..., Array]] = {
    name: Program(functools.partial(_fill, name), wide=True) for name in DISTRIBUTIONS
}
