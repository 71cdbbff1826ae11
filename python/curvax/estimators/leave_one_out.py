"""Leave-one-out estimates of a trace from the small matrices of a sketch, and their error.

With ω_i the k probes, Y = A Ω the sketch and est_i the estimate that takes its subspace from all
probes but ω_i and spends ω_i on what that subspace leaves (Epperly, Tropp and Webber, "XTrace:
making the most of every sample in stochastic trace estimation", SIAM J. Matrix Anal. Appl. 45
(2024)).

The mean of the est_i would have the standard error std(est)/√k, which the paper gives, if they were
uncorrelated; where the spectrum decays that is too small by up to a factor of 4. Their covariance
can be had from the same small matrices. Let est_ij be est_i on the sketch without ω_j as well, and
Δ_ij = est_i − est_ij. Given all other probes, est_i and est_ij have the mean t = tr A over ω_i,
whatever the sketch is. So, taking the mean over ω_j first and then over ω_i,

    E (est_ij − t)(est_j − t) = 0      est_ij does not know ω_j
    E Δ_ij (est_ji − t)       = 0      est_ji does not know ω_i

and what is left of cov(est_i, est_j) is E Δ_ij Δ_ji. Hence

    var(mean) = E[ var(est)/k + mean of Δ_ij Δ_ji over i ≠ j ],   var with k − 1 in the denominator,

exactly. All pairs cost O(k³).

Where one eigenvalue dominates what a sketch leaves, the est_i are skewed, and a few of them spread
too little. Their variance is also, by `curvax.estimators.spread`, twice the squared Frobenius norm
of the operator that is left, less the mean of its eigenvalues; and the square of its bilinear form
between ω_i and ω_j, on the sketch without both, has that norm for its mean. The variance of the
mean is not taken to be less than that of k independent estimates of this variance.
"""

from typing import NamedTuple

import numpy as np

from curvax.blas import one_thread
from curvax.typing import BoolArray, Float64Array

# Below this the sine of the angle between two directions is not told from zero.
_SMALLEST_SINE2 = 1e-9


class LeaveOneOut(NamedTuple):
    """Estimates of a trace.

    Attributes:
        single: `(k,)`, est_i.
        double: `(k, k)`, est_ij; the diagonal means nothing.
        noise: the errors of the products and of their factorisation, in a quadratic form on the
            probes: the norm of the antisymmetric part of `ΩᵀA Ω`.
        variance: of a single estimate, by the forms between two probes.
    """

    single: Float64Array
    double: Float64Array
    noise: float
    variance: float


def stderr(estimates: LeaveOneOut) -> float:
    """The standard error of the mean of the single estimates; infinite for one."""
    single, k = estimates.single, len(estimates.single)
    if k < 2:
        return float("inf")
    change = single[:, None] - estimates.double
    np.fill_diagonal(change, 0)
    shared = np.sum(change * change.T) / (k * (k - 1))
    # An estimate of few products may come out negative, where the truth is small.
    seen = float(np.var(single, ddof=1)) / k + max(float(shared), 0)
    return float(np.sqrt(max(seen, estimates.variance / k)))


def _variance(forms: Float64Array, inner: Float64Array, mean: float) -> float:
    """`2 ‖B − mean·I‖_F²` of what is left, B, by its forms between probes, and their products."""
    k = len(forms)
    if k < 2:
        return float("inf")
    forms = forms - mean * inner
    np.fill_diagonal(forms, 0)
    return 2 * float(np.sum(forms**2)) / (k * (k - 1))


class Directions(NamedTuple):
    """What leaving out columns takes from the range of `Y = Q R`, in coordinates of Q.

    Attributes:
        vectors: `(k, k)` columns s_i: the unit vector of the range of R orthogonal to all columns
            of R but the i-th; zero where that column depends on the others.
        lost: `(k,)` bool, whether s_i is not zero.
        cosines: `(k, k)` `s_iᵀs_j`.
        inverse_sines2: `(k, k)` `1/(1 − cosines²)`; zero where j takes nothing beside i.
    """

    vectors: Float64Array
    lost: BoolArray
    cosines: Float64Array
    inverse_sines2: Float64Array


@one_thread()
def directions(factor: Float64Array) -> Directions:
    """The directions s, normalised columns of the transposed pseudo-inverse of R."""
    k = len(factor)
    u, values, vt = np.linalg.svd(factor)
    kept = values > 100 * k * np.finfo(np.float64).eps * values[0]
    lost = np.sum(vt[kept] ** 2, axis=0) > 1 - 1e-6
    dual = u[:, kept] @ (vt[kept] / values[kept, None])
    dual[:, ~lost] = 0
    s = dual / np.where(lost, np.linalg.norm(dual, axis=0), 1)
    cosines = s.T @ s
    sines2 = 1 - cosines**2
    apart = (sines2 > _SMALLEST_SINE2) & lost[None, :]
    np.fill_diagonal(apart, False)
    return Directions(s, lost, cosines, np.where(apart, 1 / np.where(apart, sines2, 1), 0))


@one_thread()
def xtrace(
    projected: Float64Array,
    factor: Float64Array,
    overlap: Float64Array,
    gram: Float64Array,
    n: int,
    invariant: bool,
) -> LeaveOneOut:
    """XTrace of a symmetric operator.

    With w_i the columns of W, and the residual of ω_i on the sketch without i and j: the components
    of ω_i along s_i, and along the part u of s_j that is orthogonal to s_i, are put back. So each
    quadratic form of the residual is that of i, and terms of u.

    Args:
        projected: `(k, k)` `H = QᵀA Q`.
        factor: `(k, k)` R, of `A Ω = Q R`.
        overlap: `(k, k)` `W = QᵀΩ`.
        gram: `(k, k)` `ΩᵀΩ`.
        n: the dimension.
        invariant: whether the probes are invariant under rotations. The residual of ω_i is then
            scaled to the length √(n − k + 1), which takes the spread of its norm out.
    """
    h, r, w = projected, factor, overlap
    k = len(r)
    s, lost, g, inverse = directions(r)
    sine = np.sqrt(inverse)
    hs = h @ s
    b, along, along_h = s.T @ hs, s.T @ w, hs.T @ w
    bi, ai, hi = np.diag(b), np.diag(along), np.diag(along_h)
    di = np.sum(s * r, axis=0)
    # Nothing may be left, and of that a rounding error of either sign.
    tiny = np.finfo(np.float64).tiny
    inner = gram - w.T @ w
    left, length = n - k + lost, np.maximum(np.diag(inner) + ai**2, tiny)
    whole = w.T @ (h @ w - r)
    form = np.diag(whole) + 2 * ai * (di - hi) + ai**2 * bi
    trace = np.trace(h)
    # Row i, column j: inner products of u = (s_j − g s_i)/√(1 − g²) with w_i, r_i, H w_i, H s_i,
    # H u.
    a2 = (along.T - g * ai[:, None]) * sine
    d2 = -g * di[:, None] * sine
    h2 = (along_h.T - g * hi[:, None]) * sine
    b12 = (b - g * bi[:, None]) * sine
    b22 = (bi[None, :] - 2 * g * b + g**2 * bi[:, None]) * inverse
    form2 = form[:, None] + 2 * a2 * (d2 - h2 + ai[:, None] * b12) + a2**2 * b22
    if invariant:
        form = form * left / length
        form2 = form2 * (left[:, None] + (inverse > 0)) / (length[:, None] + a2**2)
    single, double = trace - bi + form, trace - bi[:, None] - b22 + form2
    # Without i and j, the components of ω_i are put back as p s_i + q s_j, and likewise of ω_j.
    q = (along.T - g * ai[:, None]) * inverse
    p = np.where(inverse > 0, (ai[:, None] - g * along.T) * inverse, ai[:, None])
    added = p * (s.T @ r - along_h) + q * (di - hi)[None, :]
    forms = whole + added + added.T + _between(p, q, b)
    inner = inner + _between(p, q, g)
    variance = _variance(forms, inner, float(np.sum(form) / max(np.sum(left), 1)))
    return LeaveOneOut(single, double, _noise(w.T @ r), variance)


def _between(p: Float64Array, q: Float64Array, form: Float64Array) -> Float64Array:
    """The form between `p s_i + q s_j` and its counterpart, with i and j exchanged."""
    own = np.diag(form)
    return p.T * p * form + p.T * q * own[None, :] + q.T * p * own[:, None] + q.T * q * form.T


@one_thread()
def xnystrace(
    form: Float64Array,
    factor: Float64Array,
    gram: Float64Array,
    n: int,
    invariant: bool,
    eps: float,
) -> LeaveOneOut:
    """XNysTrace (section 2.3) of a positive semidefinite operator.

    `A + νI` is estimated, whose Nyström approximation is stable, and `νn`, known, is subtracted.
    With P the inverse of `Ωᵀ(A + νI)Ω` and K = P G P, leaving out the columns I takes
    `tr(P_II⁻¹ K_II)` from the trace of the approximation, and adds `(P_II⁻¹)_ii` to the form of
    the residual with ω_i.

    Args:
        form: `(k, k)` `ΩᵀA Ω` as computed, symmetric but for the errors of the products.
        factor: `(k, k)`, with `RᵀR = G = (A Ω)ᵀ A Ω`.
        gram: `(k, k)` `ΩᵀΩ`.
        n: the dimension.
        invariant: as for `xtrace`.
        eps: relative error of a rounding of the products.

    Raises:
        ValueError: the form is not positive semidefinite.
    """
    k, size = len(form), float(np.linalg.norm(factor))
    if size == 0:
        return LeaveOneOut(np.zeros(k), np.zeros((k, k)), 0.0, 0.0)
    noise = _noise(form)
    form = (form + form.T) / 2
    values = np.linalg.eigvalsh(form)
    if values[0] < -max(1e3 * eps * max(values[-1], size), 10 * noise):
        raise ValueError(
            "method='xnystrace' needs a positive semidefinite operator: the quadratic form on the "
            f"{k} probes has eigenvalues from {values[0]:.3g} to {values[-1]:.3g}; use "
            "method='xtrace', or a positive semidefinite operator (ggn or fisher for hessian)"
        )
    # What the errors of the products may take from the form, by their size and as measured.
    shift = max(eps * size, 2 * noise, -2 * values[0]) / np.linalg.eigvalsh(gram)[0]
    inverse_root = np.linalg.inv(np.linalg.cholesky(form + shift * gram))
    p = inverse_root.T @ inverse_root
    # Each factor of G is applied to the root, not to P: the condition number is not squared.
    rp = (factor @ inverse_root.T) @ inverse_root
    inner = 2 * shift * form + shift**2 * gram
    weight = rp.T @ rp + p @ inner @ p
    trace = np.sum((factor @ inverse_root.T) ** 2) + np.sum(p * inner) - shift * n
    pi, wi = np.diag(p), np.diag(weight)
    determinant = pi[:, None] * pi[None, :] - p**2
    np.fill_diagonal(determinant, 1)
    taken = wi[:, None] * pi[None, :] + pi[:, None] * wi[None, :] - 2 * p * weight
    rest, rest2 = 1 / pi, pi[None, :] / determinant
    m = np.linalg.inv(gram)
    mi = np.diag(m)
    if invariant:
        rest = rest * (n - k + 1) * mi
        rest2 = rest2 * (n - k + 2) * (mi[:, None] - m**2 / mi[None, :])
    inner = -m / (mi[:, None] * mi[None, :] - m**2 + np.eye(k))
    variance = _variance(-p / determinant, inner, float(np.mean(rest)) / (n - k + 1))
    return LeaveOneOut(trace - wi / pi + rest, trace - taken / determinant + rest2, noise, variance)


def _noise(form: Float64Array) -> float:
    return float(np.linalg.norm(form - form.T, 2)) / 2
