"""The options that several commands share, and how their values are read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer


def check_tol(value: float | None) -> float | None:
    """A tolerance between 0 and 1, or a refusal."""
    if value is not None and not (math.isfinite(value) and 0 < value < 1):
        raise typer.BadParameter(f"expected a number between 0 and 1, got {value:g}")
    return value


# Bytes below which a number without a unit is none: `7` means GB to whoever writes it.
_LEAST_PLAIN = 10**6


def read_size(text: str) -> int:
    """Bytes of a size of memory as people write it, or a refusal.

    A number may have a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024), in
    any case, after a space or not, the B left out or not. Without one it is a number of bytes.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text.lower())
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    prefix, binary = (found[2] or "", found[3]) if found else ("", "")
    plain = found is not None and found[0].strip() == found[1]
    size = number * (1024 if binary else 1000) ** " kmgt".index(prefix or " ")
    if not (_LEAST_PLAIN if plain else 1) <= size < 2**63:
        message = f"expected a size such as 9GB, 500MB, 8GiB or 9e9 (bytes), got {text!r}"
        if plain and 0 < size:
            message += f"; did you mean {text.strip()}GB?"
        raise typer.BadParameter(message)
    return int(size)


Tol = Annotated[
    float,
    typer.Option(
        callback=check_tol,
        metavar="X",
        help="Largest relative residual allowed; between 0 and 1.",
    ),
]
Count = Annotated[
    int, typer.Option("--count", "-k", min=1, metavar="N", help="How many eigenvalues.")
]
Which = Annotated[
    Literal["LM", "LA", "SA", "BE"],
    typer.Option(help="Largest magnitude, largest, smallest, or half of them from both ends."),
]
RelativeTo = Annotated[
    Literal["largest", "end", "each"] | None,
    typer.Option(
        help="What --tol is relative to: the largest absolute eigenvalue (by default for LM, LA), "
        "the outermost of each end (for SA, BE), or each eigenvalue."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        parser=read_size,
        metavar="SIZE",
        help="Memory that the solve may add: 9GB, 500MB, 8GiB, 9e9 (bytes); what is free, if not "
        "set.",
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
