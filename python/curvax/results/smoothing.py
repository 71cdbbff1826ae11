"""Spectral measures smoothed by a Gaussian, with intervals.

Known eigenvalues are atoms of mass 1/n each; the other n − a are estimated by p random runs, each
a quadrature of nodes θ and weights w that sum to 1 (G. Golub and G. Meurant, Matrices, Moments and
Quadrature, 2010). The measure is smoothed by a Gaussian of standard deviation σ:

    (1/n) Σ_atoms N(atom, σ²) + (1 − a/n) · (1/p) Σ_runs Σ_j w_rj N(θ_rj, σ²)

The starts are uniform on the unit sphere, so that the masses that a run gives the d = n − a
eigenvalues are Dirichlet distributed with all parameters 1/2, and with E the mean over the true
measure the mean over the runs of ∫g has the variance

    2 / (p (d + 2)) · (E g² − (E g)²)

The 95 % interval is that of all means E g which a normal variable of this variance puts within 1.96
standard deviations of the one measured, with the ratio E g² / E g as measured, as Wilson's interval
of an indicator (E. Wilson, J. Amer. Statist. Assoc. 22, 1927). The spread of p runs would
give a wider one, which still fails at an isolated eigenvalue, whose mass is a χ² of p degrees of
freedom.
"""

import numpy as np
from scipy.special import ndtri

from curvax.typing import FloatArray, Numbers, Points

# Terms of the sums held at a time: arrays of 2 MB, which stay in the cache.
_CHUNK = 1 << 18


def smoothed_density(
    x: Points, nodes: FloatArray, weights: FloatArray, atoms: FloatArray, n: int, width: float
) -> tuple[Numbers, Numbers, Numbers]:
    """The density of the smoothed measure at `x`, and its pointwise 95 % interval.

    Args:
        x: points, of any shape.
        nodes: `(p, m)`; NaN where a run has fewer than m nodes. A run of none is left out.
        weights: `(p, m)`, NaN where the nodes are.
        atoms: `(a,)` the known eigenvalues.
        n: the number of eigenvalues.
        width: σ > 0.

    Returns:
        Mean, lower and upper end, each a float64 of the shape of `x`. No end is below the part of
        the atoms, which is exact.

    Raises:
        ValueError: `width` is not positive, or there is no run while a < n.
    """
    if not width > 0:
        raise ValueError(f"width, the Gaussian's standard deviation, must be > 0, got {width}")
    nodes, weights = _without_absent(nodes, weights)
    unknown, p = n - len(atoms), len(nodes)
    if p == 0 and unknown > 0:
        raise ValueError("nodes has no run, but not every eigenvalue is an atom: run at least one")
    points = np.asarray(x, np.float64)
    flat = points.ravel()
    known, mean, square = np.zeros((3, len(flat)))
    step = max(1, _CHUNK // max(1, nodes.size, len(atoms)))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        known[part] = _gaussian((flat[part, None] - atoms) / width).sum(axis=1) / n
        if unknown:
            terms = _gaussian((flat[part, None, None] - nodes) / width)
            mean[part] = np.einsum("xrj,rj->x", terms, weights) / p
            square[part] = np.einsum("xrj,rj->x", terms**2, weights) / p
    share, peak = unknown / n, 1.0 / (width * np.sqrt(2.0 * np.pi))
    ends = (mean, *(_interval(mean, square, unknown, p) if unknown else (mean, mean)))
    mean, lower, upper = ((peak * (known + share * end)).reshape(points.shape)[()] for end in ends)
    return mean, lower, upper


def _gaussian(z: FloatArray) -> FloatArray:
    # Beyond 40 σ the exponential is zero in float64, and the square could overflow.
    return np.asarray(np.exp(-0.5 * np.clip(z, -40.0, 40.0) ** 2))


def _without_absent(nodes: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Absent nodes with weight zero, at a place that does no harm; runs of none left out."""
    present = ~np.isnan(nodes)
    kept = present.any(axis=1)
    return (
        np.where(present, nodes, 0.0)[kept],
        np.where(present, weights, 0.0)[kept],
    )


def _interval(
    mean: FloatArray, square: FloatArray, dimension: int, runs: int
) -> tuple[FloatArray, FloatArray]:
    """Both ends, from the measured means of g and g²; 0 ≤ g ≤ 1."""
    # The tail, be it g or 1 − g, is what has a spread like its mean.
    flip = mean > 0.5
    square = np.where(flip, 1.0 - 2.0 * mean + square, square)
    mean = np.where(flip, 1.0 - mean, mean)
    # (E g)² ≤ E g² ≤ E g, which cancellation in 1 − g can break; it leaves noise of small tails.
    exact = mean > np.where(flip, 1e-12, 0.0)
    ratio = np.clip(np.divide(square, mean, out=mean.copy(), where=exact), mean, 1.0)
    # (E g − mean)² = k (ratio · E g − (E g)²)
    k = 2.0 * ndtri(0.975) ** 2 / (runs * (dimension + 2))
    half = np.sqrt(np.maximum(k * (ratio * (k * ratio + 4.0 * mean) - 4.0 * mean**2), 0.0))
    low, high = ((2.0 * mean + k * ratio + sign * half) / (2.0 * (1.0 + k)) for sign in (-1, 1))
    # Rounding may leave an interval of no length beside the mean.
    low, high = np.minimum(low, mean), np.maximum(high, mean)
    return np.where(flip, 1.0 - high, low), np.where(flip, 1.0 - low, high)
