"""How many vectors a block, a basis and a solve may have."""

import time

import jax
import jax.numpy as jnp

from curvax.checks import check_count, check_integer, is_integer, shown
from curvax.device import programs
from curvax.operators.base import Operator
from curvax.ops.block_ortho import MAX_BLOCK
from curvax.program import Clock, default_platform


def check_block_size(asked: object, n: int, *words: str) -> int | str:
    """Vectors per product: one of the words, or an integer up to 32 and n.

    Raises:
        TypeError: neither a string nor an integer.
        ValueError: another string, or an integer out of range.
    """
    if isinstance(asked, str) and asked in words:
        return asked
    if not is_integer(asked):
        wrong = ValueError if isinstance(asked, str) else TypeError
        named = ", ".join(map(repr, words))
        raise wrong(f"block_size must be {named} or an integer, got {shown(asked)}")
    block = check_count("block_size", asked, low=1)
    if block > min(MAX_BLOCK, n):
        why = "n = " if n < MAX_BLOCK else ""
        raise ValueError(f"block_size must be at most {why}{min(MAX_BLOCK, n)}, got {block}")
    return block


def block_penalty(block: int) -> float:
    """Products with this block against block 1, on a spectrum of outliers over a bulk.

    A block must gain more than this in speed per vector to be worth it. Measured: 1.1 to 1.4 for
    block 2, 1.5 to 2.0 for 4, 2.1 to 2.9 for 8.
    """
    return float(block**0.45)


def default_block(k: int) -> int:
    """Vectors per product.

    A block lowers no count of products: it pays where it makes each one cheaper, which on a CPU
    it does not once the primal half is shared.
    """
    return 1 if default_platform() == "cpu" or k < 32 else 4


def fastest_block(op: Operator, clock: Clock) -> int:
    """Time one product per block size, after one that compiles, and weigh it by its penalty."""
    costs = {}
    for block in (1, 2, 4, 8):
        if block > op.shape[0]:
            continue
        for _ in range(2):
            vectors = jax.block_until_ready(jnp.ones((block, op.shape[0]), op.dtype))
            start = time.perf_counter()
            jax.block_until_ready(programs.multiply(clock, op, vectors))
            costs[block] = block_penalty(block) * (time.perf_counter() - start) / block
    return min(costs, key=lambda block: costs[block])


def fewest_rows(k: int, block: int) -> int:
    """A restart must keep a block more than the wanted and make two steps before the next.

    With less, the next in line starts anew at every restart and never shows that it ranks higher.
    """
    return k + 4 * block


def comfortable_rows(k: int, block: int) -> int:
    """With more, restarts cost no products on a spectrum of outliers over a bulk."""
    return k + 10 * block


def default_rows(k: int, block: int) -> int:
    """Enough for most solves to end without a restart."""
    return max(3 * k, k + 64) + 2 * block


def matvec_limit(asked: int | None, k: int, block: int, n: int) -> int:
    """The most products of a solve.

    Raises:
        ValueError: fewer were asked for than give k pairs.
    """
    fewest = n if fewest_rows(k, block) > n else -(-k // block) * block
    check_integer("max_matvecs", asked, low=fewest)
    return asked or max(fewest, min(10 * n, max(1000, 100 * k)))
