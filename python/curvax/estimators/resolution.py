"""What a set of quadratures resolves: the width to smooth with, and single eigenvalues."""

import numpy as np
import scipy.stats

from curvax.estimators.quadrature import Quadrature
from curvax.typing import BoolArray, Float64Array

# A node is an eigenvalue, not a mean of several, where its residual is at most this part of the
# distance to its neighbours. Amid unresolved eigenvalues it is 1 to 3 times that distance.
_RESOLVED = 1e-2

# A Gaussian of standard deviation σ, integrated by Gauss quadrature with nodes s apart, is off by
# exp(−2π²(σ/s)²), as its Chebyshev coefficients of degrees beyond 2m − 1 say: 2e-5 for this σ/s.
_WIDTH = 0.75

# The part of the unresolved mass that the default width resolves: the rest may be far apart.
_BULK = 0.99

# What rounding makes of one eigenvalue, in units of the roundoff of the largest.
ROUNDING = 10.0

# The mass, in eigenvalues, below which a node is none: of 125 starts, one has so little of a given
# eigenvector.
_NO_MASS = 1e-4

# Beyond this many quartile distances from the quartiles an eigenvalue is outside the bulk: 4.7
# standard deviations of a normal distribution.
_FENCE = 3.0

# How far from a node the grid is fine, in widths: the Gaussian falls by 1e-14.
_REACH = 8.0
_FINEST, _COARSEST = 0.25, 1.0
_MOST_POINTS = 40_000


def without_ghosts(each: list[Quadrature], n: int, eps: float) -> list[Quadrature]:
    """Each run with one node per eigenvalue found.

    Those that agree to rounding are taken together, with the best residual among them; those of
    next to no mass, ghosts that have just begun to form, are left out.
    """
    rounding = ROUNDING * eps * _scale(each)
    merged = []
    for run in each:
        q = Quadrature(*(values[run.weights > _NO_MASS / n] for values in run))
        first = np.flatnonzero(np.diff(q.nodes, prepend=-np.inf) > rounding)
        weights = np.add.reduceat(q.weights, first)
        nodes = np.add.reduceat(q.weights * q.nodes, first) / weights
        merged.append(Quadrature(nodes, weights, np.minimum.reduceat(q.residuals, first)))
    return merged


def default_width(each: list[Quadrature], n: int, eps: float) -> float:
    """The width that resolves the bulk: 0.75 of the distance between nodes there.

    Nodes that are eigenvalues (outliers, the zeros of a low rank) need no smoothing and are left
    out. Of the rest, the distance is that which 99 % of the mass does not exceed: a few nodes far
    out do not set it. Where every node is an eigenvalue, 1e-3 of the largest.
    """
    scale = _scale(each)
    unresolved = [~_is_resolved(q) for q in each]
    weights = np.concatenate([q.weights[rest] for q, rest in zip(each, unresolved, strict=True)])
    # Less than half of one eigenvalue is what rounding adds.
    if weights.sum() < 0.5 * len(each) / n:
        return 1e-3 * (scale or 1.0)
    spacings = [_spacing(q)[rest] for q, rest in zip(each, unresolved, strict=True)]
    spacing = _quantile(np.concatenate(spacings), weights, _BULK)
    return max(_WIDTH * spacing, ROUNDING * eps * scale)


def isolated(each: list[Quadrature], n: int, eps: float) -> Float64Array:
    """Eigenvalues outside the bulk, descending: nodes on which the runs agree.

    The bulk reaches three quartile distances beyond the quartiles. A node counts in a run where it
    is an eigenvalue by its residual; it must do so in four of five runs, with a mass that an
    eigenvalue, 1/n times a χ² of as many degrees of freedom as there are runs, falls below once in
    a thousand. Copies of a multiple eigenvalue, and ghosts, count as one.
    """
    rounding = ROUNDING * eps * _scale(each)
    low, high = _bulk(each)
    found: list[tuple[float, float, float, int]] = []
    for run, q in enumerate(each):
        outside = (q.nodes < low - rounding) | (q.nodes > high + rounding)
        for i in np.flatnonzero(outside & _is_resolved(q)):
            found.append((q.nodes[i], q.weights[i], q.residuals[i], run))
    values = []
    least = float(scipy.stats.chi2.ppf(1e-3, len(each))) / n
    for group in _groups(sorted(found), rounding):
        nodes, weights, _, owners = (np.asarray(column) for column in zip(*group, strict=True))
        if len(set(owners.tolist())) >= 0.8 * len(each) and weights.sum() >= least:
            values.append(weights @ nodes / weights.sum())
    return np.asarray(values[::-1], np.float64)


def density_grid(nodes: Float64Array, width: float) -> Float64Array:
    """Points for the trapezoidal rule on a sum of Gaussians about the nodes.

    A quarter of a width apart within eight widths of a node, or further, up to a width, where
    there would be more than 40 000.
    """
    nodes = np.sort(nodes)
    reach = _REACH * width
    breaks = np.flatnonzero(np.diff(nodes) > 2 * reach)
    lows = nodes[np.concatenate([[0], breaks + 1])] - reach
    highs = nodes[np.concatenate([breaks, [len(nodes) - 1]])] + reach
    total = float(np.sum(highs - lows)) / width
    step = width * min(max(_FINEST, total / _MOST_POINTS), _COARSEST)
    pieces = [
        np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)
        for low, high in zip(lows, highs, strict=True)
    ]
    return np.concatenate(pieces)


def _scale(each: list[Quadrature]) -> float:
    return max(float(np.abs(q.nodes).max()) for q in each)


def _spacing(q: Quadrature) -> Float64Array:
    """How far apart the nodes are about each; of a single one, its residual."""
    gaps = np.diff(q.nodes)
    if not gaps.size:
        return q.residuals
    return (np.append(gaps, gaps[-1]) + np.insert(gaps, 0, gaps[0])) / 2


def _is_resolved(q: Quadrature) -> BoolArray:
    return q.residuals <= _RESOLVED * _spacing(q)


def _quantile(values: Float64Array, weights: Float64Array, part: float) -> float:
    """The smallest value that has this part of the mass at or below it."""
    order = np.argsort(values)
    mass = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(mass, part * mass[-1])])


def _bulk(each: list[Quadrature]) -> tuple[float, float]:
    nodes = np.concatenate([q.nodes for q in each])
    weights = np.concatenate([q.weights for q in each])
    first, third = (_quantile(nodes, weights, part) for part in (0.25, 0.75))
    return first - _FENCE * (third - first), third + _FENCE * (third - first)


def _groups(
    found: list[tuple[float, float, float, int]], rounding: float
) -> list[list[tuple[float, float, float, int]]]:
    """Sorted nodes, parted where two neighbours differ by more than their residuals explain."""
    groups: list[list[tuple[float, float, float, int]]] = []
    for entry in found:
        last = groups[-1][-1] if groups else None
        if last is not None and entry[0] - last[0] <= entry[2] + last[2] + rounding:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups
