"""The arguments of `eigsh` and `plan`, checked; what depends on memory is left open."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from curvax.checks import check_flag, check_integer, check_number, shown
from curvax.krylov.selection import Wanted, parse_wanted
from curvax.krylov.tolerance import RELATIVE_TO
from curvax.operators.base import Operator
from curvax.ops.block_ortho import MAX_BLOCK
from curvax.results import Progress

CERTIFICATES = ("residuals", "sampled", "complete")

# Storage types narrower than the float32 vectors that they hold.
NARROW = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        wanted: the eigenvalues.
        tol: the tolerance.
        relative_to: what that is relative to, one of `RELATIVE_TO`.
        seed: None to draw one.
        block_size: vectors per product, `"auto"` or `"tune"`.
        max_basis: rows of the basis, or None.
        max_matvecs: products of the solve, or None.
        basis_dtype: how the basis is stored; None for a choice by memory and tolerance.
        certify: one of `CERTIFICATES`.
        callback: called after each block, or None.
        return_eigenvectors: whether to return the vectors.
    """

    wanted: Wanted
    tol: float
    relative_to: str
    seed: int | None
    block_size: int | str
    max_basis: int | None
    max_matvecs: int | None
    basis_dtype: np.dtype[Any] | None
    certify: str
    callback: Callable[[Progress], Any] | None
    return_eigenvectors: bool


def check_arguments(op: Operator, k: Any, which: Any, options: dict[str, Any]) -> Request:
    """Check the arguments of `eigsh`; see there for what they mean and what is raised."""
    wanted = parse_wanted(k, which, op.shape[0])
    tol = check_number("tol", options["tol"])
    if options["certify"] not in CERTIFICATES:
        raise ValueError(f"certify must be one of {CERTIFICATES}, got {shown(options['certify'])}")
    if options["callback"] is not None and not callable(options["callback"]):
        raise TypeError(f"callback must be callable, got {shown(options['callback'])}")
    return Request(
        wanted=wanted,
        tol=tol,
        relative_to=_check_relative_to(options["relative_to"], wanted),
        seed=check_integer("seed", options["seed"], low=0),
        block_size=_check_block_size(options["block_size"], op.shape[0]),
        max_basis=check_integer("max_basis", options["max_basis"], low=1),
        max_matvecs=check_integer("max_matvecs", options["max_matvecs"], low=1),
        basis_dtype=_check_basis_dtype(options["basis_dtype"], op.dtype),
        certify=options["certify"],
        callback=options["callback"],
        return_eigenvectors=check_flag("return_eigenvectors", options["return_eigenvectors"]),
    )


def _check_relative_to(asked: Any, wanted: Wanted) -> str:
    if asked is None:
        return "end" if wanted.which in ("SA", "BE") else "largest"
    if asked not in RELATIVE_TO:
        raise ValueError(f"relative_to must be one of {RELATIVE_TO} or None, got {asked!r}")
    return str(asked)


def _check_block_size(asked: Any, n: int) -> int | str:
    if isinstance(asked, str) and asked in ("auto", "tune"):
        return asked
    block = None if isinstance(asked, str) else check_integer("block_size", asked, low=1)
    if block is None:
        raise ValueError(f"block_size must be 'auto', 'tune' or an integer, got {shown(asked)}")
    if block > min(MAX_BLOCK, n):
        raise ValueError(f"block_size must be at most {min(MAX_BLOCK, n)}, got {block}")
    return block


def _check_basis_dtype(asked: Any, dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    if asked is None:
        return dtype
    if isinstance(asked, str) and asked == "auto":
        return None
    allowed = (dtype, *NARROW) if dtype == np.float32 else (dtype,)
    try:
        found = jnp.dtype(asked)
    except TypeError:
        found = None
    if found not in allowed:
        names = ", ".join(entry.name for entry in allowed)
        raise ValueError(
            f"basis_dtype must be one of {names}, for an operator in {dtype.name}, or 'auto'; got "
            f"{shown(asked)}"
        )
    return np.dtype(found)
