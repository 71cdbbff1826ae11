"""The picture of eigenvalues: stems with bounds, and the measured residuals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curvax.plot.style import (
    DARK,
    FAILED,
    GREY,
    INDEX_LABEL,
    MAX_LABELLED,
    NEGATIVE,
    POSITIVE,
    caption,
    finish,
    new_figure,
    set_log,
    set_symlog,
    signed,
    symlog_threshold,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from curvax.results import EigenResult
    from curvax.typing import BoolArray, FloatArray, IntArray


def plot_spectrum(
    result: EigenResult, path: str | Path | None = None, title: str | None = None
) -> Figure:
    """Draw eigenvalues with their bounds, and below them the measured residuals.

    Values stand in descending order, numbered from both ends, with a gap between those counted
    from the high end and those from the low end; pairs that did not converge have open markers.
    The axis is logarithmic where a linear one would flatten values that are better known than that.
    The lower panel shows what each residual was measured to be, and
    the largest that counts as converged. No global state of matplotlib is used or changed.

    Args:
        result: what `eigsh` returned.
        path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
        title: text above the picture.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(6.4, 4.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    places = _places(result.indices)
    _draw_values(upper, places, result)
    _draw_residuals(lower, places, result)
    _label_indices(lower, places, result.indices)
    upper.tick_params(bottom=False)
    upper.spines["bottom"].set_visible(False)
    return finish(figure, path, title)


def _places(indices: IntArray) -> FloatArray:
    """Where on the horizontal axis each value stands: 1, 2, … with a gap between the ends."""
    lower = (indices < 0) & bool(np.any(indices > 0))
    # Of many, wide enough for the numbers to either side.
    return np.arange(1, len(indices) + 1) + max(1.0, 0.06 * len(indices)) * lower


def _draw_values(axes: Axes, places: FloatArray, result: EigenResult) -> None:
    values, converged = result.eigenvalues, result.converged
    bounds = np.nan_to_num(result.bounds, posinf=0.0)
    set_symlog(axes, "y", symlog_threshold(values, bounds))
    axes.margins(y=0.12)
    axes.axhline(0.0, color="0.2", linewidth=0.8)
    for group, colour in ((values >= 0, POSITIVE), (values < 0, NEGATIVE)):
        axes.vlines(places[group], 0.0, values[group], color=colour, linewidth=1.6, alpha=0.45)
        _mark(axes, places, values, group & converged, colour)
    label = "not converged" if result.certified else "not certified"
    _mark(axes, places, values, ~converged, FAILED, label=label)

    heights = axes.yaxis.get_transform().transform
    lengths = heights(values + bounds) - heights(values - bounds)
    visible = lengths > 0.01 * np.ptp(heights(np.append(values, 0.0)))
    if np.any(visible):
        axes.errorbar(
            places[visible],
            values[visible],
            yerr=bounds[visible],
            fmt="none",
            ecolor=DARK,
            elinewidth=0.9,
            capsize=3,
            zorder=4,
            label="bound",
        )
    if len(values) <= MAX_LABELLED:
        _write_values(axes, places, values, np.where(visible, bounds, 0.0))
    axes.set_ylabel("eigenvalue", fontsize=9)
    if np.any(visible) or not np.all(converged):
        axes.legend(frameon=False, fontsize=8)


def _mark(
    axes: Axes,
    places: FloatArray,
    values: FloatArray,
    which: BoolArray,
    colour: str,
    label: str | None = None,
) -> None:
    if np.any(which):
        axes.plot(
            places[which],
            values[which],
            "o",
            markersize=5.5 if len(places) <= 2 * MAX_LABELLED else 3.5,
            color=colour,
            markerfacecolor="white" if label else colour,
            markeredgewidth=1.4,
            label=label,
            zorder=3,
        )


def _write_values(axes: Axes, places: FloatArray, values: FloatArray, bars: FloatArray) -> None:
    for place, value, bar in zip(places, values, bars, strict=True):
        sign = 1 if value >= 0 else -1
        axes.annotate(
            f"{value:#.3g}".rstrip(".").replace("-", "\N{MINUS SIGN}"),
            (place, value + sign * bar),
            xytext=(0, 6 * sign),
            textcoords="offset points",
            ha="center",
            va="bottom" if sign > 0 else "top",
            fontsize=7,
            color="0.25",
        )


def _draw_residuals(axes: Axes, places: FloatArray, result: EigenResult) -> None:
    # The largest of the spectrum need not be among the wanted.
    seen = [progress.largest for progress in result.history[-1:]]
    scale = max([*np.abs(result.eigenvalues), *seen], default=0.0)
    limits = result.tol_effective * scale
    # A residual of exactly zero has no place on a logarithmic axis: it is drawn at the bottom.
    floor = np.finfo(np.float64).eps * (scale or 1.0)
    residuals = np.maximum(result.residuals, floor)
    measured = np.isfinite(result.residuals)
    set_log(axes)
    _mark(axes, places, residuals, measured & result.converged, GREY)
    _mark(axes, places, residuals, measured & ~result.converged, FAILED, label="not converged")
    said = _draw_limits(axes, places, limits, result.tol_effective)
    if not np.all(measured):
        why = "the solve was interrupted"
        if not result.certified:
            why = "every product had its own operator"
        said = f"{said}; others not measured: {why}" if np.any(measured) else f"not measured: {why}"
    caption(axes, said, FAILED)
    axes.margins(y=0.35)
    axes.set_ylabel("residual", fontsize=9)


def _draw_limits(axes: Axes, places: FloatArray, limits: FloatArray, relative: FloatArray) -> str:
    """Dash the residuals allowed, from border to border where all are alike; what to say of it."""
    style: dict[str, Any] = {"color": FAILED, "linewidth": 1.0, "linestyle": (0, (4, 2))}
    if not limits.size:
        return ""
    if np.ptp(limits) <= 1e-6 * limits.max():
        if limits[0] > 0:
            axes.axhline(float(limits[0]), **style)
        return rf"dashed: tolerance {relative[0]:.1e} $\times\ |\lambda|_{{\max}}$"
    for part in np.split(np.arange(len(limits)), np.flatnonzero(np.diff(limits)) + 1):
        ends = [places[part[0]] - 0.5, places[part[-1]] + 0.5]
        axes.plot(ends, [limits[part[0]]] * 2, **style)
    return "dashed: tolerance, relative to each end or value"


def _label_indices(axes: Axes, places: FloatArray, indices: IntArray) -> None:
    counts = np.abs(indices)
    steps = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    step = next(step for step in steps if len(places) <= step * MAX_LABELLED)
    shown = (counts == 1) | (counts % step == 0)
    axes.set_xticks(places[shown], [signed(index) for index in indices[shown]])
    axes.set_xlim(0.2, float(np.max(places, initial=1.0)) + 0.8)
    axes.set_xlabel(INDEX_LABEL if np.all(counts) else "index not known", fontsize=9)
