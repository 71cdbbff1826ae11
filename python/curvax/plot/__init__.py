"""Pictures of results, with matplotlib (the extra `plot`).

Each function returns a figure of its own: no global state of matplotlib is used or changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from curvax.plot.blocks import plot_blocks
from curvax.plot.density import plot_density
from curvax.plot.estimates import plot_diagonal, plot_lanczos, plot_trace
from curvax.plot.spectrum import plot_spectrum
from curvax.results import (
    BlockResults,
    DiagonalResult,
    EigenResult,
    LanczosTridiagonal,
    SpectralDensity,
    TraceResult,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "plot",
    "plot_blocks",
    "plot_density",
    "plot_diagonal",
    "plot_lanczos",
    "plot_spectrum",
    "plot_trace",
]

_PICTURES: dict[type, Callable[..., Figure]] = {
    BlockResults: plot_blocks,
    DiagonalResult: plot_diagonal,
    EigenResult: plot_spectrum,
    LanczosTridiagonal: plot_lanczos,
    SpectralDensity: plot_density,
    TraceResult: plot_trace,
}


def plot(result: object, path: str | Path | None = None, title: str | None = None) -> Figure:
    """Draw a result with the function for its class; `result.plot` is this.

    Args:
        result: of any class in `curvax.results`.
        path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
        title: text above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: there is no picture for the class.
    """
    for kind in type(result).__mro__:
        if kind in _PICTURES:
            return _PICTURES[kind](result, path, title)
    names = ", ".join(sorted(kind.__name__ for kind in _PICTURES))
    raise TypeError(f"result must be one of {names} to be drawn, got {type(result).__name__}")
