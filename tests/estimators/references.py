"""The estimators by brute force in float64, from the same probes."""

import jax.numpy as jnp
import numpy as np
from tests.krylov.spectra import N

import curvax as cx
from curvax.device import probes
from curvax.program import Clock

METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
SKETCHES = METHODS[1:]

# Most tests share these numbers, and so the compiled programs.
PRODUCTS, BLOCK = 24, 4

# Rows of a seed's sequence that do not go into a sketch.
INDEPENDENT = 1 << 31


def decaying():
    """Positive definite, eigenvalues 1/i."""
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
    return (q / np.arange(1, N + 1)) @ q.T


def trace(a, **options):
    """In float32 where `a` is a NumPy array."""
    a = a.astype(np.float32) if isinstance(a, np.ndarray) else a
    return cx.trace(a, **{"num_matvecs": PRODUCTS, "block_size": BLOCK, "seed": 0, **options})


def drawn(n, count, seed, distribution, first=0, dtype=np.float32):
    """`(count, n)` probes in float64."""
    op = cx.identity(jnp.zeros(n, dtype))
    like = jnp.zeros(count, jnp.int32)
    return np.asarray(probes.draw(Clock(), op, like, seed, first, distribution), np.float64)


def form_stderr(a, z, distribution, off=None):
    """The standard error of the mean of `zᵀA z` on what orthonormal columns `off` leave.

    From 2 (‖A‖_F² − (tr A)²/d) for a sphere of d dimensions, 2 ‖A‖_F² for Gaussian probes, and
    that without the diagonal for ±1, each estimated from the products.
    """
    n, k = z.shape[1], len(z)
    project = np.eye(n) - (0 if off is None else off @ off.T)
    a, d = project @ a @ project, n - (0 if off is None else off.shape[1])
    w = z @ a
    if distribution == "rademacher":
        return np.sqrt(2 * np.sum(np.var(z * w, axis=0, ddof=1)) / k)
    scale = d / np.sum((z @ project) ** 2, axis=1) if distribution == "sphere" else np.ones(k)
    norm2 = np.mean(scale * np.sum(w * w, axis=1))
    if distribution == "gaussian":
        return np.sqrt(2 * norm2 / k)
    samples = scale * np.sum(z * w, axis=1)
    mean2 = samples.mean() ** 2 - samples.var(ddof=1) / k
    return np.sqrt(2 * d / (d + 2) * (norm2 - max(mean2, 0) / d) / k)


def hutch_plus_plus(a, sketch, rest, scaled):
    """The estimate, the samples of the rest, scaled to a sphere of its dimension or not; Q."""
    q, _ = np.linalg.qr(a @ sketch.T)
    left = rest.T - q @ (q.T @ rest.T)
    samples = np.sum(left * (a @ left), axis=0)
    if scaled:
        samples *= (len(a) - len(sketch)) / np.sum(left * left, axis=0)
    return np.trace(q.T @ a @ q) + samples.mean(), samples, q


def xtrace(a, omega, scaled):
    """Leave-one-out estimates, each from a QR factorisation of its own."""
    n, k = len(a), len(omega)
    estimates = []
    for i in range(k):
        q, _ = np.linalg.qr(a @ np.delete(omega, i, axis=0).T)
        left = omega[i] - q @ (q.T @ omega[i])
        scale = (n - k + 1) / (left @ left) if scaled else 1.0
        estimates.append(np.trace(q.T @ a @ q) + scale * (left @ a @ left))
    return np.array(estimates)


def xnystrace(a, omega, scaled):
    """Leave-one-out estimates, each from a Nyström approximation of its own."""
    n, k = len(a), len(omega)
    estimates = []
    for i in range(k):
        others = np.delete(omega, i, axis=0).T
        y = a @ others
        h, inner = others.T @ y, y.T @ omega[i]
        left = omega[i] - others @ np.linalg.lstsq(others, omega[i])[0]
        scale = (n - k + 1) / (left @ left) if scaled else 1.0
        form = omega[i] @ a @ omega[i] - inner @ np.linalg.solve(h, inner)
        estimates.append(np.trace(np.linalg.solve(h, y.T @ y)) + scale * form)
    return np.array(estimates)


def xtrace_variance(a, omega, scaled):
    """`2 ‖B − mean I‖_F²` of what the sketch leaves, by its forms between two probes."""
    n, k = len(a), len(omega)

    def left(i, j):
        q, _ = np.linalg.qr(a @ np.delete(omega, [i, j], axis=0).T)
        x = omega[[i, j]] - omega[[i, j]] @ q @ q.T
        return x @ a @ x.T, x @ x.T

    def one(i):
        form, inner = (x[0, 0] for x in left(i, i))
        return form / inner if scaled else form / (n - k + 1)

    return _variance(k, left, one)


def xnystrace_variance(a, omega, scaled):
    """The same for the Nyström approximation."""
    n, k = len(a), len(omega)

    def left(i, j):
        others = np.delete(omega, [i, j], axis=0).T
        y, pair = a @ others, omega[[i, j]].T
        x = pair - others @ np.linalg.lstsq(others, pair)[0]
        rest = a - y @ np.linalg.solve(others.T @ y, y.T)
        return pair.T @ rest @ pair, x.T @ x

    def one(i):
        form, inner = (x[0, 0] for x in left(i, i))
        return form / inner if scaled else form / (n - k + 1)

    return _variance(k, left, one)


def _variance(k, left, one):
    mean = np.mean([one(i) for i in range(k)])
    pairs = [left(i, j) for i in range(k) for j in range(i)]
    return 2 * np.mean([(form[0, 1] - mean * inner[0, 1]) ** 2 for form, inner in pairs])


def xdiag(a, omega):
    """`(k, n)` leave-one-out estimates of the diagonal."""
    estimates = []
    for i in range(len(omega)):
        q, _ = np.linalg.qr(a @ np.delete(omega, i, axis=0).T)
        rest = a - q @ (q.T @ a)
        estimates.append(np.diag(a - rest) + omega[i] * (rest @ omega[i]))
    return np.array(estimates)


def stderr(estimates, leave_out, variance=0.0):
    """The standard error of the mean of exchangeable estimates, by the same identity.

    Args:
        estimates: `(k, ...)`.
        leave_out: j → the k − 1 estimates without the j-th probe.
        variance: of a single one; that of the mean is at least what independent ones have.
    """
    k = len(estimates)
    change = np.zeros((k, *estimates.shape))
    for j in range(k):
        others = np.delete(np.arange(k), j)
        change[others, j] = estimates[others] - leave_out(j)
    shared = np.sum(change * np.swapaxes(change, 0, 1), axis=(0, 1)) / (k * (k - 1))
    seen = np.var(estimates, axis=0, ddof=1) / k + np.maximum(shared, 0)
    return np.sqrt(np.maximum(seen, variance / k))
