"""Plain text tables of results, at most 80 columns wide."""

import math
from collections.abc import Sequence

import numpy as np

_WIDTH = 80
_GAP = "  "


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, named: bool = False) -> str:
    """A table of right-aligned columns, each as wide as its longest cell.

    Args:
        header: one title per column.
        rows: the cells.
        named: whether the first column holds names: left-aligned, and cut in the middle where the
            line would be longer than 80 columns.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if named:
        others = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
        widths[0] = min(widths[0], max(_WIDTH - others, 8))
        for line in lines:
            line[0] = shortened(line[0], widths[0]).ljust(widths[0])
    return "\n".join(
        _GAP.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def shortened(name: str, width: int) -> str:
    """A name of at most `width` characters; the ends, which tell names apart, are kept."""
    if len(name) <= width:
        return name
    tail = (width - 3 + 1) // 2
    return f"{name[: width - 3 - tail]}...{name[len(name) - tail :]}"


def place(index: int | np.integer) -> str:
    """A place in a table."""
    return str(index) if index else "?"


def measured(number: float) -> str:
    """A residual or a bound in a table."""
    return "-" if math.isnan(number) else f"{number:.2e}"


def verdict(residual: float, converged: bool | np.bool_, marks: tuple[str, str]) -> str:
    """What a table says of a pair: the first mark or the second, once its residual is measured."""
    return "not verified" if math.isnan(residual) else marks[0 if converged else 1]
