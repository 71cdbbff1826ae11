"""Pictures of block results: heat maps of eigenvalues, bars of traces, spreads of diagonals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curvax.plot.estimates import draw_spreads
from curvax.plot.style import (
    DARK,
    FAILED,
    INDEX_LABEL,
    MAX_LABELLED,
    NEGATIVE,
    POSITIVE,
    caption,
    finish,
    name_rows,
    new_figure,
    number,
    rows_height,
    set_symlog,
    signed,
    symlog_threshold,
)
from curvax.results import DiagonalResult, EigenResult, TraceResult, numbered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from curvax.results import BlockResults
    from curvax.typing import BoolArray, FloatArray

# Cells per row in which a number can be written.
_MAX_COLUMNS = 10

# Of red, green and blue (ITU-R BT.601).
_LUMINANCE = (0.299, 0.587, 0.114)

_LAYERED = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<layer>\d+)\.(?P<kind>.+)")


def plot_blocks(
    result: BlockResults[Any], path: str | Path | None = None, title: str | None = None
) -> Figure:
    """Draw the results of all blocks side by side.

    Eigenvalues are a heat map: blocks × index, counted from both ends; or, where every name reads
    `stack.<layer>.<kind>` with one stack (`blocks.0.attn`), layers × kinds of the eigenvalue of
    largest magnitude. A cross marks what did not converge. Traces are bars with 95 % intervals,
    diagonals the spread of each block's entries.

    Args:
        result: what a computation over blocks returned.
        path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
        title: text above the picture.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no block.
    """
    if not result:
        raise ValueError("result must have at least one block to be drawn")
    first = next(iter(result.values()))
    grid = _layers_and_kinds(list(result)) if isinstance(first, EigenResult) else None
    figure = new_figure(6.4, rows_height(len(grid[0]) if grid else len(result)))
    axes = figure.subplots()
    if grid:
        _draw_layers(axes, result, *grid)
    elif isinstance(first, EigenResult):
        _draw_eigenvalues(axes, result)
    elif isinstance(first, TraceResult):
        _draw_traces(axes, result)
    else:
        draw_spreads(axes, {name: _all_entries(block) for name, block in result.items()})
    return finish(figure, path, title)


def _layers_and_kinds(names: Sequence[str]) -> tuple[list[int], list[str]] | None:
    """The layers, ascending, and the kinds in their order, if the names are a grid of them."""
    matches = [match for match in map(_LAYERED.fullmatch, names) if match]
    layers = sorted({int(match["layer"]) for match in matches})
    kinds = list(dict.fromkeys(match["kind"] for match in matches))
    stacks = {match["stack"] for match in matches}
    whole = len(matches) == len(names) and len(stacks) == 1
    return (layers, kinds) if whole and min(len(layers), len(kinds)) > 1 else None


def _draw_layers(
    axes: Axes, result: Mapping[str, EigenResult], layers: list[int], kinds: list[str]
) -> None:
    values = np.full((len(layers), len(kinds)), np.nan)
    converged = np.ones(values.shape, np.bool_)
    for name, block in result.items():
        match = _LAYERED.fullmatch(name)
        if match and len(block.eigenvalues):
            cell = layers.index(int(match["layer"])), kinds.index(match["kind"])
            largest = np.argmax(np.abs(block.eigenvalues))
            values[cell], converged[cell] = block.eigenvalues[largest], block.converged[largest]
    _draw_heat(axes, values, converged)
    name_rows(axes, [str(layer) for layer in layers])
    axes.set_xticks(range(len(kinds)), kinds, rotation=30 if len(kinds) > 4 else 0)
    axes.set_xlabel("of each block the eigenvalue of largest magnitude", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)


def _draw_eigenvalues(axes: Axes, result: Mapping[str, EigenResult]) -> None:
    high, low = (
        max(int(np.sum(sign * block.indices >= least)) for block in result.values())
        for sign, least in ((1, 0), (-1, 1))
    )
    values = np.full((len(result), max(high + low, 1)), np.nan)
    converged = np.ones(values.shape, np.bool_)
    for row, block in enumerate(result.values()):
        of_high = np.arange(len(block.indices))
        columns = np.where(block.indices < 0, values.shape[1] + block.indices, of_high)
        values[row, columns] = block.eigenvalues
        converged[row, columns] = block.converged
    _draw_heat(axes, values, converged)
    name_rows(axes, list(result))
    indices = numbered(values.shape[1], low)
    step = -(-len(indices) // MAX_LABELLED)
    shown = (np.abs(indices) - 1) % step == 0
    axes.set_xticks(np.flatnonzero(shown), [signed(index) for index in indices[shown]])
    axes.set_xlabel(INDEX_LABEL, fontsize=9)


def _draw_heat(axes: Axes, values: FloatArray, converged: BoolArray) -> None:
    norm, colours = _colours(values)
    image = axes.imshow(values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("eigenvalue", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    shades = image.to_rgba(values)
    if values.shape[1] <= _MAX_COLUMNS and len(values) <= 2 * MAX_LABELLED:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = np.dot(shades[row, column, :3], _LUMINANCE) < 0.5
                axes.text(
                    column,
                    row,
                    number(float(value)),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else DARK,
                )
    rows, columns = np.nonzero(~converged)
    if len(rows):
        axes.plot(columns + 0.4, rows - 0.3, "x", color=FAILED, markersize=4, markeredgewidth=1.4)
        caption(axes, "× not converged", FAILED)


def _colours(values: FloatArray) -> tuple[Normalize, str]:
    """The scale and the colour map: diverging where there are both signs."""
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    threshold = symlog_threshold(values.ravel())
    if np.any(values < 0):
        if threshold is None:
            return Normalize(-largest, largest), "RdBu"
        return SymLogNorm(threshold, vmin=-largest, vmax=largest), "RdBu"
    if threshold is None:
        return Normalize(0.0, largest), "cividis"
    return LogNorm(threshold, largest, clip=True), "cividis"


def _draw_traces(axes: Axes, result: Mapping[str, TraceResult]) -> None:
    estimates = np.array([block.estimate for block in result.values()])
    intervals = np.array([block.interval for block in result.values()])
    errors = np.abs(intervals - estimates[:, None])
    errors = np.where(np.isfinite(errors), errors, 0.0)
    rows = np.arange(len(estimates))
    axes.barh(
        rows,
        estimates,
        height=0.7,
        color=np.where(estimates < 0, NEGATIVE, POSITIVE),
        alpha=0.6,
        xerr=errors.T,
        error_kw={"ecolor": DARK, "elinewidth": 0.9, "capsize": 2},
    )
    set_symlog(axes, "x", symlog_threshold(estimates, errors.max(axis=1)))
    axes.axvline(0.0, color="0.2", linewidth=0.8)
    name_rows(axes, list(result))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("trace, with its 95 % interval", fontsize=9)


def _all_entries(block: DiagonalResult) -> tuple[FloatArray, FloatArray]:
    entries, errors = zip(*block.leaves().values(), strict=True)
    return np.concatenate(entries), np.concatenate(errors)
