"""Loops over columns of rows too long to be widened whole, and sums in a fixed order."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from curvax.program import default_platform

# Columns per step, on a CPU, of whatever would need a widened copy of rows, or scratch as long as
# they are; and columns that share a key wherever random numbers are drawn.
CHUNK = 1 << 16
# Elsewhere a step costs launches: it takes more columns, as far as its rows are few.
_WIDE_CHUNK = 1 << 22
_WIDE_BYTES = 1 << 28


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` in the precision of the operands, whatever JAX's setting for products is.

    Under a preset such as `BF16_BF16_F32_X3`, JAX would narrow even operands in float64.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def row_sums(x: Array) -> Array:
    """Sums over the last axis, in an order that depends on its length alone.

    By halves, added elementwise: XLA orders the sums of a reduction as it splits it among threads.
    """
    width = x.shape[-1]
    size = 1 << max(width - 1, 0).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - width)])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


Carry = TypeVar("Carry")


def over_columns(
    fun: Callable[[Carry, Array, int], Carry], carry: Carry, n: int, *, rows: int, chunks: int = 1
) -> Carry:
    """Fold `fun(carry, first, width)` over chunks of the columns 0 to n; each begins at a `CHUNK`.

    Args:
        fun: one step.
        carry: what is folded into.
        n: the number of columns.
        rows: how many rows of float64 a step holds at once.
        chunks: how many chunks a step takes on a CPU, a power of two.
    """
    step = _columns_per_step(rows, chunks)
    whole, rest = divmod(n, step)
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, c: fun(c, i * step, step), carry)
    return fun(carry, jnp.asarray(whole * step), rest) if rest else carry


def _columns_per_step(rows: int, chunks: int) -> int:
    """A power of two: `row_sums` pads to one."""
    if default_platform() == "cpu":
        return CHUNK * chunks
    fitting = _WIDE_BYTES // (8 * max(rows, 1))
    return min(max(1 << max(fitting.bit_length() - 1, 0), CHUNK), _WIDE_CHUNK)


def random_columns(
    draw: Callable[[Array, int], Array], key: Array, first: Array, width: int
) -> Array:
    """The columns from `first`, a multiple of `CHUNK`, on: the same whatever width they come in.

    Args:
        draw: gets a key and a width; the columns are the last axis of what it returns.
        key: of all columns.
        first: the first column.
        width: how many.
    """
    whole, rest = divmod(width, CHUNK)
    pieces = []
    if whole == 1:
        pieces.append(draw(jax.random.fold_in(key, first), CHUNK))
    elif whole:
        starts = first + CHUNK * jnp.arange(whole, dtype=first.dtype)
        parts = jax.vmap(lambda start: draw(jax.random.fold_in(key, start), CHUNK))(starts)
        parts = jnp.moveaxis(parts, 0, -2)
        pieces.append(parts.reshape(*parts.shape[:-2], whole * CHUNK))
    if rest:
        pieces.append(draw(jax.random.fold_in(key, first + whole * CHUNK), rest))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
