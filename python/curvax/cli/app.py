"""What the commands share: the application, exit statuses, options and their checks."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

# What bad input raises, by now in words of ours.
INPUT_ERRORS = (ValueError, TypeError, ImportError, MemoryError, OSError, KeyError, ArithmeticError)
NOT_CONVERGED = 3
BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="curvax",
    help="Curvature of neural-network losses: certified eigenpairs, traces, diagonals, densities.",
    no_args_is_help=True,
    # Plain help: the decorated one gives every flag a type.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def check_tol(value: float | None) -> float | None:
    """A tolerance between 0 and 1, or a refusal."""
    if value is not None and not (math.isfinite(value) and 0 < value < 1):
        raise typer.BadParameter(f"expected a number between 0 and 1, got {value:g}")
    return value


_TOL = typer.Option(
    callback=check_tol,
    metavar="X",
    help="Largest residual allowed, relative to the largest absolute eigenvalue; between 0 and 1.",
)
Tol = Annotated[float, _TOL]
OptionalTol = Annotated[float | None, _TOL]
Count = Annotated[int, typer.Option("--count", "-k", min=1, metavar="N", help="Eigenvalues.")]
Which = Annotated[
    Literal["LM", "LA", "SA", "BE"],
    typer.Option(help="Largest magnitude, largest, smallest, or both ends."),
]
RelativeTo = Annotated[
    Literal["largest", "end", "each"] | None,
    typer.Option(
        help="What --tol is relative to: the largest absolute eigenvalue (by default for LM, LA), "
        "the outermost of each end (for SA, BE), or each eigenvalue."
    ),
]
Limit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that the solve may add: 9GB, 500MB, 8GiB, or a number of GB; what is free, if "
        "not set.",
    ),
]
MaxMatvecs = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Stop the solve after this many products."),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the starting vector.")]
Certify = Annotated[
    Literal["residuals", "complete"],
    typer.Option(help="Prove residuals only, or also search for missed eigenvalues."),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the files go; made if need be.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"curvax {importlib.metadata.version('curvax')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Curvature of neural-network losses: certified eigenpairs, traces, diagonals, densities."""


def check_matvecs(max_matvecs: int | None, k: int, remedy: str) -> None:
    """Refuse fewer products than eigenvalues."""
    if max_matvecs is not None and max_matvecs < k:
        message = f"{k} eigenvalues need at least as many products, got {max_matvecs}"
        raise typer.BadParameter(
            f"{message}; raise it or lower {remedy}", param_hint="--max-matvecs"
        )


def make_directory(path: Path) -> None:
    """Make the directory for the files, or refuse it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        obstacle = None if os.access(path, os.W_OK) else "not writable"
    except OSError as error:
        obstacle = error.strerror
    if obstacle:
        message = f"expected a directory to write to, got {str(path)!r} ({obstacle})"
        raise typer.BadParameter(f"{message}; choose another", param_hint="--out")


def describe(error: BaseException) -> str:
    """A message, with the notes that were added to it; a KeyError's own is but a key."""
    text = f"no {error}" if type(error) is KeyError else str(error) or type(error).__name__
    return "\n".join([text, *getattr(error, "__notes__", [])])


def limit_bytes(limit: str | None) -> int | None:
    """A size of memory in bytes, or a refusal."""
    if limit is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(?:([kmgt]?)(i?)b)?\s*", limit.lower())
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    prefix, binary = (match[2], match[3]) if match and match[2] is not None else ("g", "")
    size = number * (1024 if binary else 1000) ** " kmgt".index(prefix or " ")
    if not 1 <= size < 2**63 or (binary and not prefix):
        raise typer.BadParameter(
            f"expected a size such as 9GB, 500MB or 8GiB, or a positive number of GB, got {limit}",
            param_hint="--limit",
        )
    return int(size)


def fail(message: str, status: int) -> NoReturn:
    """End with a message on stderr."""
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(f"error: {message}")
    raise typer.Exit(status)
