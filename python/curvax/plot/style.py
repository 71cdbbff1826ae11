"""What all pictures share: colours, scales, the frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from curvax.results.tables import place, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from curvax.typing import FloatArray

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by the open markers.
POSITIVE = "#0072B2"
NEGATIVE = "#009E73"
FAILED = "#D55E00"
GREY = "0.45"
DARK = "0.15"

# Above this ratio of magnitudes a linear axis flattens the small values into the zero line.
LINEAR_RANGE = 200.0

# With more values than this, numbers written beside the markers would touch.
MAX_LABELLED = 20

INDEX_LABEL = "index: 1 is the highest, \N{MINUS SIGN}1 the lowest"

# Rows that can all have a name beside them, and the letters of a name that leave room to draw.
MAX_ROWS = 50
MAX_NAME = 32


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, outside pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'curvax[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, path: str | Path | None, title: str | None) -> Figure:
    """Frame the panels, and write the title and the file that were asked for."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=8)
    if title is not None:
        figure.suptitle(title, fontsize=10)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def symlog_threshold(values: FloatArray, errors: FloatArray | None = None) -> float | None:
    """The end of the linear part of an axis for `values`; None if all of it can be linear.

    Args:
        values: what is drawn.
        errors: half the length of each value's error bar. One that would reach far towards zero,
            or past it, looks endless where the scale is logarithmic: the linear part holds it.
    """
    known = np.isfinite(values) & (values != 0)
    sizes = np.abs(values[known])
    if not sizes.size:
        return None
    # A power of ten: a label inside the linear part would touch the zero.
    threshold = 10.0 ** np.floor(np.log10(max(sizes.min(), 1e-6 * sizes.max())))
    smallest = sizes.min()
    if errors is not None:
        reach = np.abs(values) + errors
        reach = reach[np.isfinite(reach) & (errors > 0.5 * np.abs(values))]
        if reach.size:
            smallest = max(smallest, reach.max())
            threshold = max(threshold, 10.0 ** np.ceil(np.log10(reach.max())))
    return float(threshold) if sizes.max() > LINEAR_RANGE * smallest else None


def set_symlog(axes: Axes, which: Literal["x", "y"], threshold: float | None) -> None:
    """Make an axis logarithmic on both sides of its linear part, if there is a threshold."""
    if threshold is None:
        return
    if which == "y":
        axes.set_yscale("symlog", linthresh=threshold)
        return
    from matplotlib.ticker import SymmetricalLogLocator

    axes.set_xscale("symlog", linthresh=threshold)
    # Labels lie side by side: the usual number of them would touch.
    locator = SymmetricalLogLocator(base=10.0, linthresh=threshold)
    locator.set_params(numticks=8)
    axes.xaxis.set_major_locator(locator)


def set_log(axes: Axes) -> None:
    """Make the vertical axis of a low panel logarithmic, with labels that do not touch.

    They stand at powers of ten and, where these would be few, at twice and five times them.
    """
    axes.set_yscale("log")

    def label(value: float, _: float) -> str:
        low, high = axes.get_ylim()
        power = int(np.floor(np.log10(value) + 1e-9))
        digit = round(value / 10.0**power)
        if digit not in (2, 5) or high > 100.0 * low:
            return ""
        return rf"$\mathdefault{{{digit}\times10^{{{power}}}}}$"

    axes.yaxis.set_minor_formatter(label)


def caption(axes: Axes, text: str, color: str = GREY) -> None:
    """Small print at the upper right, outside the panel."""
    axes.set_title(text, loc="right", fontsize=7, color=color, pad=3)


def rows_height(count: int) -> float:
    """Inches for a picture with a row for each of `count` names."""
    return 1.3 + 0.22 * min(max(count, 2), MAX_ROWS)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write the names beside rows 0, 1, ...; of many, every second, third, ..."""
    step = -(-len(names) // MAX_ROWS) or 1
    shown = range(0, len(names), step)
    axes.set_yticks(list(shown), [shortened(names[row], MAX_NAME) for row in shown])


def signed(index: int) -> str:
    """An index as the tables have it, with a minus sign as long as a plus."""
    return place(index).replace("-", "\N{MINUS SIGN}")


def number(value: float) -> str:
    """Three digits or the integer part, and a minus sign as long as a plus."""
    text = f"{value:.0f}" if 999.5 <= abs(value) < 99999.5 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")
