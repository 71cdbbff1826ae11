"""The picture of a spectral density: its band, its outliers, and the bulk on a scale of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curvax.plot.style import DARK, POSITIVE, caption, finish, new_figure, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from curvax.results import SpectralDensity
    from curvax.typing import FloatArray

# A bulk narrower than this part of the spectrum gets a panel of its own.
_NARROW = 0.05

# Share of the bulk's mass left out at each end of its panel.
_TAIL = 0.001

# Least distance of two outliers' labels, as a part of the panel's width.
_LABEL_GAP = 0.026


def plot_density(
    result: SpectralDensity, path: str | Path | None = None, title: str | None = None
) -> Figure:
    """Draw a spectral density on a logarithmic scale, with its 95 % band and its outliers.

    Triangles above the panel stand at the outliers, labelled from the largest down as far as the
    labels do not touch. Where the bulk is narrower than a twentieth of the spectrum, a second
    panel shows it on a scale of its own. The scale ends at a tenth of the height of a single
    eigenvalue's peak.

    Args:
        result: what `spectral_density` returned.
        path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
        title: text above the picture.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    low, high = _bulk(result)
    first, last = float(result.grid[0]), float(result.grid[-1])
    zoomed = high - low < _NARROW * (last - first)
    figure = new_figure(6.4, 5.4 if zoomed else 3.6)
    panels = figure.subplots(2 if zoomed else 1, 1, squeeze=False)[:, 0]
    margin = 0.02 * (last - first)
    _draw_curve(panels[0], result, first - margin, last + margin)
    if len(result.outliers):
        _draw_outliers(panels[0], result.outliers)
    panels[0].legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    if zoomed:
        _draw_curve(panels[1], result, low, high)
        panels[0].set_xlabel("eigenvalue", fontsize=9)
        caption(panels[1], "the bulk alone")
    panels[-1].set_xlabel(
        f"eigenvalue (smoothed by a Gaussian of standard deviation {result.width:.2g})", fontsize=9
    )
    return finish(figure, path, title)


def _bulk(result: SpectralDensity) -> tuple[float, float]:
    """The interval between the outliers of both sides that holds nearly all mass there."""
    present = ~np.isnan(result.nodes)
    order = np.argsort(result.nodes[present])
    nodes, weights = result.nodes[present][order], result.weights[present][order]
    if not len(nodes):
        return float(result.grid[0]), float(result.grid[-1])
    mass = np.cumsum(weights)
    outliers, middle = result.outliers, nodes[np.searchsorted(mass, 0.5 * mass[-1])]
    margin = 5.0 * result.width
    below = np.max(outliers[outliers < middle], initial=-np.inf) + margin
    above = np.min(outliers[outliers > middle], initial=np.inf) - margin
    inside = (nodes > below) & (nodes < above)
    if not np.any(inside):
        return float(result.grid[0]), float(result.grid[-1])
    mass = np.cumsum(weights[inside])
    ends = np.searchsorted(mass, [_TAIL * mass[-1], (1.0 - _TAIL) * mass[-1]])
    low, high = nodes[inside][ends]
    pad = margin + 0.04 * (high - low)
    return float(low - pad), float(high + pad)


def _draw_curve(axes: Axes, result: SpectralDensity, low: float, high: float) -> None:
    floor = _floor(result)
    shown = result.density[(result.grid >= low) & (result.grid <= high)]
    peak = float(np.max(shown, initial=10.0 * floor))
    axes.set_xlim(low, high)
    axes.set_yscale("log")
    # A quarter more of the logarithmic height, for the legend.
    axes.set_ylim(floor, peak * (peak / floor) ** 0.25)
    axes.plot(result.grid, result.density, color=POSITIVE, linewidth=1.1, label="density")
    axes.fill_between(
        result.grid,
        # Zero has no place on the scale: the band then reaches below its end.
        np.maximum(result.lower, 1e-3 * floor),
        np.maximum(result.upper, 1e-3 * floor),
        color=POSITIVE,
        alpha=0.25,
        linewidth=0,
        label="95 % band",
    )
    axes.set_ylabel("density", fontsize=9)


def _floor(result: SpectralDensity) -> float:
    """A tenth of the height that one eigenvalue of n makes."""
    return 0.1 / (result.num_parameters * result.width * np.sqrt(2.0 * np.pi))


def _draw_outliers(axes: Axes, outliers: FloatArray) -> None:
    above = axes.get_xaxis_transform()
    axes.plot(
        outliers,
        np.full(len(outliers), 1.03),
        "v",
        transform=above,
        color=DARK,
        markersize=4,
        clip_on=False,
        label="outliers",
    )
    low, high = axes.get_xlim()
    labelled: list[float] = []
    for value in outliers[np.argsort(-np.abs(outliers), kind="stable")]:
        if all(abs(value - other) > _LABEL_GAP * (high - low) for other in labelled):
            labelled.append(value)
            axes.annotate(
                number(value),
                (value, 1.06),
                xycoords=above,
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=7,
                color="0.25",
                annotation_clip=False,
            )
