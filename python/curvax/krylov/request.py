"""What `eigsh` and `plan` are asked for: their options, and the checked request."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict, Unpack

import jax.numpy as jnp
import numpy as np

from curvax.checks import (
    check_callback,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_seed,
    shown,
)
from curvax.krylov.selection import Wanted, parse_wanted
from curvax.krylov.sizes import check_block_size
from curvax.krylov.tolerance import RELATIVE_TO
from curvax.operators.base import Operator
from curvax.options import takes_options
from curvax.results import Progress

CERTIFICATES = ("residuals", "sampled", "complete")

# Storage types narrower than the float32 vectors that they hold.
NARROW = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


class PlanOptions(TypedDict, total=False):
    """Options of `eigsh` on which memory and products depend, with their defaults."""

    which: Annotated[Literal["LM", "LA", "SA", "BE"], "LM"]
    tol: Annotated[float, 1e-3]
    block_size: Annotated[int | Literal["auto", "tune"], "auto"]
    max_basis: Annotated[int | None, None]
    certify: Annotated[Literal["residuals", "sampled", "complete"], "residuals"]
    return_eigenvectors: Annotated[bool, True]


class EigshOptions(PlanOptions, total=False):
    """Options of `eigsh`, which says what they mean, with their defaults."""

    relative_to: Annotated[Literal["largest", "end", "each"] | None, None]
    v0: Annotated[Any, None]
    seed: Annotated[int | None, None]
    max_matvecs: Annotated[int | None, None]
    basis_dtype: Annotated[Any, None]
    callback: Annotated[Callable[[Progress], Any] | None, None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for, checked; what depends on memory is left open, for the `Plan`.

    Attributes:
        wanted: the eigenvalues.
        tol: the tolerance.
        relative_to: what that is relative to, one of `RELATIVE_TO`.
        v0: where to start, not yet read, or None.
        seed: of all random numbers.
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
    v0: Any
    seed: int
    block_size: int | str
    max_basis: int | None
    max_matvecs: int | None
    basis_dtype: np.dtype[Any] | None
    certify: str
    callback: Callable[[Progress], Any] | None
    return_eigenvectors: bool

    @classmethod
    @takes_options(EigshOptions)
    def of(cls, op: Operator, k: Any, **options: Unpack[EigshOptions]) -> "Request":
        """Check the arguments of `eigsh`; see there for what they mean and what is raised."""
        wanted = parse_wanted(k, options["which"], op.shape[0])
        return cls(
            wanted=wanted,
            tol=check_number("tol", options["tol"]),
            relative_to=_check_relative_to(options["relative_to"], wanted),
            v0=options["v0"],
            seed=check_seed(options["seed"]),
            block_size=check_block_size(options["block_size"], op.shape[0], "auto", "tune"),
            max_basis=check_integer("max_basis", options["max_basis"], low=1),
            max_matvecs=check_integer("max_matvecs", options["max_matvecs"], low=1),
            basis_dtype=_check_basis_dtype(options["basis_dtype"], op.dtype),
            certify=check_choice("certify", options["certify"], CERTIFICATES),
            callback=check_callback(options["callback"]),
            return_eigenvectors=check_flag("return_eigenvectors", options["return_eigenvectors"]),
        )


def _check_relative_to(asked: Any, wanted: Wanted) -> str:
    if asked is None:
        return "end" if wanted.which in ("SA", "BE") else "largest"
    return check_choice("relative_to", asked, RELATIVE_TO, also=" or None")


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
