"""Pictures of estimates: a trace as it converges, the entries of a diagonal, Ritz values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curvax.plot.style import (
    DARK,
    FAILED,
    GREY,
    NEGATIVE,
    POSITIVE,
    caption,
    finish,
    name_rows,
    new_figure,
    rows_height,
    set_log,
    set_symlog,
    symlog_threshold,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from curvax.results import DiagonalResult, LanczosTridiagonal, TraceResult
    from curvax.typing import FloatArray

_MAX_LEAVES = 40

# Least, 5 %, median, 95 %, largest.
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def plot_trace(
    result: TraceResult, path: str | Path | None = None, title: str | None = None
) -> Figure:
    """Draw how an estimate of a trace converged with the products made.

    Above, the estimate after each block with 1.96 standard errors to either side, and at the end
    the 95 % interval of the result; below, the standard error, and the one asked for (`until`).

    Args:
        result: what `trace` or `log_det` returned.
        path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
        title: text above the picture.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(6.4, 4.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    products = np.array([entry.matvecs for entry in result.history], np.float64)
    estimates = np.array([entry.estimate for entry in result.history], np.float64)
    errors = np.array([entry.stderr for entry in result.history], np.float64)
    _draw_estimates(upper, result, products, estimates, errors)
    _draw_errors(lower, result, products, errors)
    return finish(figure, path, title)


def _draw_estimates(
    axes: Axes,
    result: TraceResult,
    products: FloatArray,
    estimates: FloatArray,
    errors: FloatArray,
) -> None:
    known = np.isfinite(errors) & np.isfinite(estimates)
    low, high = estimates - 1.96 * errors, estimates + 1.96 * errors
    if result.method == "exact":  # a sum, which begins at zero and has no error
        products, estimates = np.append(0.0, products), np.append(0.0, estimates)
    else:
        band = products[known], low[known], high[known]
        label = "± 1.96 standard errors"
        axes.fill_between(*band, color=POSITIVE, alpha=0.2, linewidth=0, label=label)
        # The first estimates can be off by far more than the last: the later half sets the scale.
        late = known & (products >= 0.5 * result.num_matvecs)
        _zoom(axes, result, np.concatenate([low[late], high[late], np.array(result.interval)]))
    axes.plot(products, estimates, ".-", color=POSITIVE, linewidth=1.1, markersize=3)
    ends = np.abs(np.array(result.interval) - result.estimate)
    bounded = bool(np.all(np.isfinite(ends)))
    axes.errorbar(
        [result.num_matvecs],
        [result.estimate],
        yerr=ends[:, None] if bounded else None,
        fmt="o",
        color=DARK,
        markersize=4,
        capsize=4,
        elinewidth=1.2,
        label="result, 95 % interval" if bounded else "result",
    )
    axes.set_ylabel("sum so far" if result.method == "exact" else "estimate", fontsize=9)
    axes.legend(
        frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.98), borderpad=0
    )
    if result.interrupted:
        caption(axes, "interrupted", FAILED)


def _zoom(axes: Axes, result: TraceResult, shown: FloatArray) -> None:
    """Centre the estimate, with room for all that is to be shown."""
    distances = np.abs(shown[np.isfinite(shown)] - result.estimate)
    reach = 1.6 * np.max(distances, initial=0.0) or 0.1 * abs(result.estimate) or 1.0
    if np.isfinite(result.estimate):
        axes.set_ylim(result.estimate - reach, result.estimate + reach)


def _draw_errors(axes: Axes, result: TraceResult, products: FloatArray, errors: FloatArray) -> None:
    # Errors of zero (an exact result) and unknown ones have no place on the scale.
    shown = np.isfinite(errors) & (errors > 0)
    if np.any(shown) or 0 < result.stderr < np.inf:
        set_log(axes)
        axes.plot(products[shown], errors[shown], ".-", color=GREY, linewidth=1.1, markersize=3)
        axes.plot([result.num_matvecs], [result.stderr], "o", color=DARK, markersize=4)
    else:
        caption(axes, "zero" if result.stderr == 0 else "not known")
        axes.set_yticks([])
    until = result.history[-1].until if result.history else None
    if until is not None:
        axes.axhline(until, color=FAILED, linewidth=1.0, linestyle=(0, (4, 2)))
        caption(axes, f"dashed: asked for, {until:.2g}", FAILED)
    axes.margins(y=0.2)
    axes.set_ylabel("standard error", fontsize=9)
    axes.set_xlim(0, 1.05 * max(result.num_matvecs, 1))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("products", fontsize=9)


def plot_diagonal(
    result: DiagonalResult, path: str | Path | None = None, title: str | None = None
) -> Figure:
    """Draw the spread of the diagonal's entries in each leaf, beside their standard errors.

    A thin line from the least to the largest entry, a thick one over the middle 90 %, a dot at the
    median; an orange stroke at the median standard error. Of more than 40 leaves, the 40 with the
    most entries are drawn. Entries that are NaN are left out.

    Args:
        result: what `diagonal` returned.
        path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
        title: text above the picture.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    leaves = {name: pair for name, pair in result.leaves().items() if len(pair[0])}
    largest = sorted(leaves, key=lambda name: -len(leaves[name][0]))[:_MAX_LEAVES]
    shown = [name for name in leaves if name in set(largest)]
    figure = new_figure(6.4, rows_height(len(shown)))
    axes = figure.subplots()
    draw_spreads(axes, {name: leaves[name] for name in shown})
    if len(shown) < len(leaves):
        axes.set_xlabel(f"{axes.get_xlabel()} (the {len(shown)} largest of {len(leaves)} leaves)")
    return finish(figure, path, title)


def draw_spreads(axes: Axes, spreads: Mapping[str, tuple[FloatArray, FloatArray]]) -> None:
    """Draw a row per name, from the top, of entries and their standard errors."""
    rows = np.arange(len(spreads))
    quantiles = np.full((len(rows), len(_QUANTILES)), np.nan)
    errors = np.full(len(rows), np.nan)
    for row, (entries, stderr) in enumerate(spreads.values()):
        if len(entries):
            quantiles[row], errors[row] = np.quantile(entries, _QUANTILES), np.median(stderr)
    least, low, median, high, largest = quantiles.T
    # What is small within a leaf may lie near zero; what is small as a leaf must be seen.
    sizes = [np.abs(median), np.maximum(np.abs(least), np.abs(largest)), errors]
    set_symlog(axes, "x", symlog_threshold(np.concatenate(sizes)))
    axes.axvline(0.0, color="0.8", linewidth=0.8, zorder=0)
    axes.hlines(rows, least, largest, color=POSITIVE, linewidth=1.0, label="least to largest")
    axes.hlines(rows, low, high, color=POSITIVE, linewidth=5.0, alpha=0.45, label="5 % to 95 %")
    axes.plot(median, rows, "o", color=POSITIVE, markersize=4, label="median")
    if np.any(errors > 0):
        axes.plot(errors, rows, "|", color=FAILED, markersize=8, label="median standard error")
    name_rows(axes, list(spreads))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("entry of the diagonal", fontsize=9)
    axes.figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside lower center")


def plot_lanczos(
    result: LanczosTridiagonal, path: str | Path | None = None, title: str | None = None
) -> Figure:
    """Draw the Ritz values and, on a logarithmic scale, their quadrature weights.

    A Ritz value whose residual is less than 1e-3 of the largest magnitude has a filled marker.

    Args:
        result: what `lanczos_tridiagonal` returned.
        path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
        title: text above the picture.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    values, weights, residuals = result.ritz()
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    axes.set_yscale("log")
    # Weights below the square of float64's resolution are rounding.
    weights = np.maximum(weights, np.finfo(np.float64).eps ** 2)
    floor = 0.3 * min(float(weights.min()), 0.1)
    settled = residuals <= 1e-3 * np.max(np.abs(values))
    for group, colour in ((values >= 0, POSITIVE), (values < 0, NEGATIVE)):
        axes.vlines(values[group], floor, weights[group], color=colour, linewidth=1.4, alpha=0.45)
        for which, face in ((group & settled, colour), (group & ~settled, "white")):
            axes.plot(
                values[which],
                weights[which],
                "o",
                color=colour,
                markerfacecolor=face,
                markersize=4,
            )
    # The bulk stays linear, where outliers would flatten it into a line.
    sizes = np.abs(values)
    set_symlog(axes, "x", symlog_threshold(np.array([np.median(sizes), np.max(sizes)])))
    axes.set_ylim(floor, 4.0)
    axes.set_xlabel("Ritz value", fontsize=9)
    axes.set_ylabel("weight", fontsize=9)
    if not np.all(settled):
        caption(axes, "open: residual above 0.001 of the largest value")
    return finish(figure, path, title)
