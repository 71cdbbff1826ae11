"""The fraction of an operator's eigenvalues at or below a point, with an interval that covers it.

Of n eigenvalues, a are known (atoms), and p random runs saw the other d = n − a: each a quadrature
of nodes θ and weights w. Two errors make the interval, and neither is a guess.

**Quadrature.** A run's start has the spectral measure μ, and its quadrature of m nodes determines
the moments of μ up to degree 2m − 1; the residuals of the nodes, which hold the coupling to the
next step, add degree 2m. Of all measures with these moments, the mass at or below x is largest and
smallest for the one rule that has a node at x itself (the inequalities of Chebyshev, Markov and
Stieltjes: N. Akhiezer, The Classical Moment Problem, 1965, chapter 2; G. Golub and G. Meurant,
Matrices, Moments and Quadrature, 2010, section 6.2 for that rule, of Gauss and Radau):

    Σ_{θ < x} w  ≤  μ(−∞, x]  ≤  Σ_{θ ≤ x} w

The mean of the runs' measures has the mean of their moments, so that one recurrence, of the mean,
does for all runs. Plain Lanczos rounds: T is the exact projection of a matrix whose eigenvalues lie
in tiny clusters about those of A (see `krylov/recurrence.py`), so that an eigenvalue within
rounding of x may be on either side.

**Starts.** They are uniform on the sphere, so that the mass that a run gives k of d eigenvalues is
Beta(k/2, (d − k)/2) distributed: with F = k/d its mean is F, its variance 2 F (1 − F)/(d + 2). The
mean of p runs has 1/p of that variance, which is that of Beta(F N, (1 − F) N) with
N = p (d + 2)/2 − 1. The interval is that of all k for which a mass as large as the least, or as
small as the greatest, that the quadrature allows has a probability of 0.025 or more: that of
Clopper and Pearson, for this distribution.

**Left out.** Vectors X with A X = X Θ + R leave out the eigenvalues Θ only up to R. Without the
part of R outside the span of X, an eigenvalue at a distance η from those left out moves by no more
than 2‖R‖² / (η + √(η² + 4‖R‖²)), and no eigenvalue by more than ‖R‖ (C.-K. Li and R.-C. Li, Linear
Algebra Appl. 395, 2005); without the part inside, those left out by no more than ‖R‖ (Weyl).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.special import betainc

from curvax.typing import BoolArray, FloatArray

# A point further out than this many times the largest node counts as this far out.
FAR = 1e3

# A coupling below this ends the recurrence: rounding in float64.
_NONE = 1e-14

# Points of the integral along the imaginary axis, from this part of the least distance to a node up
# to the greatest over it. The step is at most 0.4 for distances down to the least here.
_POINTS = 160
_TAILS = 1e-5
_CLOSEST = 1e-16
_TINY = 1e-140

# The error that this leaves in a mass.
_MASS = 1e-9

# Elements of the arrays held at a time.
_CHUNK = 1 << 17

_TAIL = 0.025


Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class MeanRule(NamedTuple):
    """The Gauss rule of the mean of the runs' measures, and what its recurrence couples to next.

    With the tridiagonal T = V diag(θ) Vᵀ of k steps, of the operator divided by `scale`:

    Attributes:
        nodes: `(k,)` θ, ascending.
        first: `(k,)` the first row of V; its squares are the weights.
        last: `(k,)` the last row, times the coupling to the next step.
        scale: the largest absolute node of the runs.
    """

    nodes: FloatArray
    first: FloatArray
    last: FloatArray
    scale: float


def mean_rule(nodes: FloatArray, weights: FloatArray, residuals: FloatArray) -> MeanRule:
    """Lanczos, with full reorthogonalisation, on the runs side by side.

    Each run is T in the basis of its eigenvectors, where the start has the entries √w and the
    coupling to the next step is the vector of the residuals, of alternating sign. Rows of some tail
    follow: without them the rule of a run that has found many eigenvalues more than once, as equal
    to rounding, would end before its own steps do.

    Args:
        nodes: `(p, m)` ascending; NaN where a run has fewer than m.
        weights: `(p, m)`.
        residuals: `(p, m)`; zero for runs that ended in an invariant subspace.
    """
    present = ~np.isnan(nodes)
    kept = present.any(axis=1)
    nodes, weights, residuals, present = (x[kept] for x in (nodes, weights, residuals, present))
    runs, most = nodes.shape
    scale = float(np.abs(nodes[present]).max()) or 1.0
    theta = np.where(present, nodes, 0.0) / scale
    coupling = np.where(present, residuals, 0.0) / scale * (-1.0) ** np.arange(most)
    ended = ~coupling.any(axis=1)
    lengths = np.sum(present, axis=1)
    steps = int(np.sum(lengths) if ended.all() else lengths[~ended].min())
    tail = 0 if ended.all() else steps

    def multiply(flat: FloatArray) -> FloatArray:
        seen, rest = np.split(flat.reshape(runs, most + tail), [most], axis=1)
        out, beyond = theta * seen, np.zeros_like(rest)
        if tail:
            out += coupling * rest[:, :1]
            beyond[:, 0] = np.sum(coupling * seen, axis=1)
            beyond[:, 1:] += 0.5 * rest[:, :-1]
            beyond[:, :-1] += 0.5 * rest[:, 1:]
        return np.concatenate([out, beyond], axis=1).ravel()

    start = np.zeros((runs, most + tail))
    start[:, :most] = np.sqrt(np.where(present, weights, 0.0))
    alphas, betas = _lanczos(multiply, start.ravel(), steps)
    theta, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas[:-1])
    return MeanRule(theta, vectors[0], betas[-1] * vectors[-1], scale)


def _lanczos(
    multiply: Callable[[FloatArray], FloatArray], start: FloatArray, steps: int
) -> tuple[FloatArray, FloatArray]:
    """αs and βs, with the last coupling, of `steps` steps or up to an invariant subspace."""
    basis = np.zeros((steps + 1, start.size))
    basis[0] = start / np.linalg.norm(start)
    alphas, betas = np.zeros((2, steps))
    for k in range(steps):
        rest = multiply(basis[k])
        alphas[k] = rest @ basis[k]
        for _ in range(2):
            rest -= basis[: k + 1].T @ (basis[: k + 1] @ rest)
        betas[k] = np.linalg.norm(rest)
        if betas[k] <= _NONE:
            betas[k] = 0.0
            return alphas[: k + 1], betas[: k + 1]
        basis[k + 1] = rest / betas[k]
    return alphas, betas


def mass_bounds(rule: MeanRule, x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The least and the greatest mass at or below `x` of measures with this recurrence.

    They are sums over the rule that has a node at x: T with a row more, its last entry such that x
    is an eigenvalue. Its masses are not computed one by one: with μ̂ its resolvent, which follows
    from T's, that at x is the residue of μ̂ there, and the difference between those above and those
    below is

        (2/π) ∫ Re μ̂(x + it) dt,  t > 0

    for which the trapezoidal rule in log t is exact to 2 exp(−π²/h), of a step h.

    Args:
        rule: of k steps.
        x: `(g,)` points; not NaN.
    """
    x = np.clip(x, -FAR * rule.scale, FAR * rule.scale) / rule.scale
    before = np.searchsorted(rule.nodes, x, "right")
    if not rule.last.any():
        mass = np.concatenate([[0.0], np.cumsum(rule.first**2)])[before]
        return mass, mass
    chunk = max(1, _CHUNK // (_POINTS * len(rule.nodes)))
    pieces = [_at_and_above(rule, x[i : i + chunk]) for i in range(0, len(x), chunk)]
    at, above = np.concatenate([np.zeros((2, 0)), *pieces], axis=1)
    # Beyond the last node there is no mass but that at x.
    lower = np.where(before == 0, 0.0, (1.0 - at - above) / 2)
    lower = np.where(before == len(rule.nodes), 1.0 - at, lower)
    return lower, lower + at


def _at_and_above(rule: MeanRule, x: FloatArray) -> FloatArray:
    """The mass at x, and the masses above less those below, of the rule with a node there."""
    gaps = rule.nodes - x[:, None]
    gaps = np.where(np.abs(gaps) < _TINY, _TINY, gaps)
    ratios = rule.last / gaps
    at = (ratios @ rule.first) ** 2 / (1.0 + np.sum(ratios**2, axis=1))
    # The other nodes of the rule are further from x than the nearest of T.
    sizes = np.abs(gaps)
    least = _TAILS * np.maximum(sizes.min(axis=1), _CLOSEST)
    step = np.log(sizes.max(axis=1) / _TAILS / least) / (_POINTS - 1)
    t = least[:, None] * np.exp(step[:, None] * np.arange(_POINTS))
    # 1/(θ − x − it) = (θ − x + it)/((θ − x)² + t²), and its sums with the entries of T's resolvent.
    squares = 1.0 / (gaps[:, None, :] ** 2 + t[:, :, None] ** 2)
    pairs = (rule.first**2, rule.first * rule.last)
    columns = np.stack([np.broadcast_to(v, gaps.shape) for v in pairs] + [rule.last * ratios], 2)
    real = squares @ (columns * gaps[:, :, None])
    corner, side, other = np.moveaxis(real + 1j * t[:, :, None] * (squares @ columns), 2, 0)
    terms = t * np.real(corner + 1j * side**2 / (t * (1.0 + other)))
    # What the sum leaves out is geometric on both sides.
    ends = (terms[:, 0] + terms[:, -1]) / np.expm1(step)
    return np.stack([at, 2.0 / np.pi * step * (np.sum(terms, axis=1) + ends)])


class Cells(NamedTuple):
    """Nodes of all runs, each with its mass spread evenly over a neighbourhood.

    Attributes:
        nodes: `(k,)`.
        masses: `(k,)`, of sum 1.
        halves: `(k,)` how far each reaches to either side.
    """

    nodes: FloatArray
    masses: FloatArray
    halves: FloatArray

    def below(self, x: FloatArray) -> FloatArray:
        """The mass at or below `x`, `(g,)`."""
        step = max(1, _CHUNK // len(self.nodes))
        pieces = [self._below(x[i : i + step]) for i in range(0, len(x), step)]
        return np.concatenate([np.zeros(0), *pieces])

    def _below(self, x: FloatArray) -> FloatArray:
        part = np.clip(x[:, None] - self.nodes, -self.halves, self.halves) / self.halves
        return np.asarray((0.5 + 0.5 * part) @ self.masses)


def cells(nodes: FloatArray, weights: FloatArray, residuals: FloatArray) -> Cells:
    """The mean measure as an estimate: what a node stands for lies about it.

    That is one eigenvalue, where the residual is small, which is then as close as the square of it
    over the distance to the neighbours, or else all between these; so its mass is spread over half
    of the one or of the other to either side.

    Args:
        nodes: `(p, m)` ascending; NaN where a run has fewer than m.
        weights: `(p, m)`.
        residuals: `(p, m)`.
    """
    present = ~np.isnan(nodes)
    runs = int(np.sum(present.any(axis=1)))
    end = np.full((len(nodes), 1), np.nan)
    gaps = np.concatenate([end, np.diff(nodes, axis=1), end], axis=1)
    left, right = gaps[:, :-1], gaps[:, 1:]
    outermost = np.isnan(left) | np.isnan(right)
    spacing = np.where(outermost, np.fmax(left, right), (left + right) / 2)
    residuals, spacing = residuals[present], spacing[present]
    # A single node, of one step, has no neighbours; of no residual, it is an eigenvalue.
    single = np.isnan(spacing)
    spacing[single] = residuals[single]
    ratio = np.divide(residuals, spacing, out=np.ones_like(spacing), where=spacing > 0)
    halves = spacing * np.minimum(ratio, 1.0) ** 2 / 2
    halves = np.maximum(halves, np.finfo(np.float64).tiny)
    return Cells(nodes[present], weights[present] / runs, halves)


def fraction_interval(
    lower: FloatArray, upper: FloatArray, dimension: int, runs: int
) -> tuple[FloatArray, FloatArray]:
    """The 95 % interval of the fraction of d eigenvalues, from the bounds of their mean mass.

    Both ends are multiples of 1/d, as the fraction is.
    """
    total = runs * (dimension + 2) / 2 - 1
    lower, upper = np.maximum(lower - _MASS, 0.0), np.minimum(upper + _MASS, 1.0)

    def below(count: Counts, mass: FloatArray) -> FloatArray:
        """The probability of a mass of at most `mass`, if `count` eigenvalues make it."""
        part = count / dimension
        return np.asarray(betainc(part * total, (1.0 - part) * total, mass))

    # Of all or none the mass is certain.
    least = _first(lambda k: below(dimension - k, 1.0 - lower) >= _TAIL, dimension, lower.shape)
    most = _first(lambda k: below(dimension - k, upper) >= _TAIL, dimension, upper.shape)
    least = np.where(lower > 0, least, 0)
    most = dimension - np.where(upper < 1, most, 0)
    # Where every number is improbable: those on both sides.
    return np.minimum(least, most) / dimension, np.maximum(least, most) / dimension


def _first(holds: Callable[[Counts], BoolArray], size: int, shape: tuple[int, ...]) -> Counts:
    """The first of 1 … size for which a condition holds, as it does from there on."""
    low, high = np.zeros(shape, np.int64), np.full(shape, size, np.int64)
    for _ in range(size.bit_length()):
        middle = (low + high) // 2
        # Of two neighbours the middle is the lower one, for which it does not hold.
        there = np.where(middle > low, holds(np.maximum(middle, 1)), False)
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    return high


def displacement(x: FloatArray, atoms: FloatArray, coupling: float) -> FloatArray:
    """How far from `x` the runs, which leave the atoms out, may see an eigenvalue that is there.

    Args:
        x: `(g,)` points.
        atoms: `(a,)` the eigenvalues left out.
        coupling: ‖A X − X Θ‖ for their vectors X.
    """
    if not coupling:
        return np.zeros_like(x)
    gap = np.min(np.abs(x[:, None] - atoms), axis=1)
    # What is seen is no further than this from x, and the atoms than this from X A Xᵀ.
    gap = np.maximum(gap - 2 * coupling, 0.0)
    return np.asarray(2 * coupling**2 / (gap + np.sqrt(gap**2 + 4 * coupling**2)))
