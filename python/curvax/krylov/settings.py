"""The arguments of `eigsh`, checked, with every default decided."""

import dataclasses
import math
import secrets
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.krylov.selection import Wanted, parse_wanted
from curvax.operators.base import Operator
from curvax.ops.block_ortho import MAX_BLOCK
from curvax.plan import SHARE, available_bytes
from curvax.results import Progress

CERTIFICATES = ("residuals", "sampled", "complete")

# Relative products of block b against block 1 on a spectrum of outliers over a bulk: a larger
# block must gain more than this in speed per vector to be worth it.
_PENALTY = {1: 1.0, 2: 1.2, 4: 1.8, 8: 2.7}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that steers a solve."""

    wanted: Wanted
    tol: float
    seed: int
    block: int
    rows: int
    max_matvecs: int
    basis_dtype: np.dtype[Any]
    certify: str
    callback: Callable[[Progress], Any] | None
    return_eigenvectors: bool


def settle(op: Operator, k: Any, which: Any, options: dict[str, Any]) -> Settings:
    """Check the arguments of `eigsh`; see there for what they mean and what is raised."""
    n = op.shape[0]
    wanted = parse_wanted(k, which, n)
    tol = _check_tol(options["tol"])
    if options["certify"] not in CERTIFICATES:
        raise ValueError(f"certify must be one of {CERTIFICATES}, got {options['certify']!r}")
    if options["callback"] is not None and not callable(options["callback"]):
        raise TypeError(f"callback must be callable, got {options['callback']!r}")
    seed = _integer("seed", options["seed"], secrets.randbits(32), low=0)
    if not _is_dtype(options["basis_dtype"] or op.dtype, op.dtype):
        raise ValueError(
            f"basis_dtype must be that of the operator, {op.dtype.name}, "
            f"got {options['basis_dtype']!r}"
        )
    if not isinstance(options["return_eigenvectors"], (bool, np.bool_)):
        raise TypeError(
            f"return_eigenvectors must be True or False, got {options['return_eigenvectors']!r}"
        )
    block = _block_size(op, options["block_size"], wanted.k)
    fewest = n if _fewest_rows(wanted.k, block) > n else -(-wanted.k // block) * block
    default_matvecs = max(fewest, min(10 * n, max(1000, 100 * wanted.k)))
    max_matvecs = _integer("max_matvecs", options["max_matvecs"], default_matvecs, low=fewest)
    rows = _basis_rows(op, options["max_basis"], wanted.k, block)
    return Settings(
        wanted=wanted,
        tol=tol,
        seed=seed,
        block=block,
        rows=rows,
        max_matvecs=max_matvecs,
        basis_dtype=op.dtype,
        certify=options["certify"],
        callback=options["callback"],
        return_eigenvectors=bool(options["return_eigenvectors"]),
    )


def _is_dtype(asked: Any, dtype: Any) -> bool:
    try:
        return bool(np.dtype(asked) == dtype)
    except TypeError:
        return False


def _check_tol(tol: Any) -> float:
    if isinstance(tol, (bool, str)) or not isinstance(tol, (int, float, np.number)):
        raise TypeError(f"tol must be a number, got {tol!r}")
    if not (math.isfinite(tol) and tol >= 0):
        raise ValueError(f"tol must be finite and not negative, got {tol!r}")
    return float(tol)


def _integer(name: str, value: Any, default: int, low: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def _block_size(op: Operator, asked: Any, k: int) -> int:
    n = op.shape[0]
    if asked == "tune":
        return _fastest_block(op)
    if asked == "auto":
        # A block lowers no count of products: it pays where it makes each one cheaper, which on
        # a CPU it does not once the primal half is shared.
        return 1 if jax.default_backend() == "cpu" or k < 32 else 4
    if isinstance(asked, str):
        raise ValueError(f"block_size must be 'auto', 'tune' or an integer, got {asked!r}")
    block = _integer("block_size", asked, 1, low=1)
    if block > min(MAX_BLOCK, n):
        raise ValueError(f"block_size must be at most {min(MAX_BLOCK, n)}, got {block}")
    return block


def _fastest_block(op: Operator) -> int:
    """Time one product per block size, after one that compiles, and weigh it by its penalty."""
    multiply = jax.jit(lambda op, block: op.product(block))
    costs = {}
    for block, penalty in _PENALTY.items():
        if block > op.shape[0]:
            continue
        vectors = jnp.ones((block, op.shape[0]), op.dtype)
        jax.block_until_ready(multiply(op, vectors))
        start = time.perf_counter()
        jax.block_until_ready(multiply(op, vectors))
        costs[block] = penalty * (time.perf_counter() - start) / block
    return min(costs, key=lambda block: costs[block])


def _fewest_rows(k: int, block: int) -> int:
    """A restart must keep a block more than the wanted and make two steps before the next.

    With less, the next in line starts anew at every restart and never shows that it ranks higher.
    """
    return k + 4 * block


def _basis_rows(op: Operator, asked: Any, k: int, block: int) -> int:
    n, smallest = op.shape[0], _fewest_rows(k, block)
    row_bytes = n * op.dtype.itemsize
    # Beside the basis: a block, its products, the scratch of the product, and the result.
    beside = (k + 4 * block) * row_bytes
    free = available_bytes()
    if asked is None:
        generous = max(3 * k, k + 64) + 2 * block
        affordable = int(max(SHARE * free - beside, 0) // row_bytes)
        rows = min(generous, max(affordable, smallest))
    else:
        rows = _integer("max_basis", asked, 0, low=1)
        if rows < min(smallest, n):
            raise ValueError(
                f"max_basis must be at least k + 4*block_size = {smallest}, got {rows}"
            )
    rows = min(rows, n)
    if rows * row_bytes + beside > free:
        raise MemoryError(
            f"a basis of {rows} vectors of {n} {op.dtype.name} and its work space take "
            f"{(rows * row_bytes + beside) / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free: lower "
            f"max_basis (at least {smallest}), k, or the number of parameters by a filter (where=)"
        )
    return rows
