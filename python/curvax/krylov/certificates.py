"""What is measured of the pairs that a solve found, with products made after it."""

import dataclasses
import math
from typing import Any

import numpy as np

from curvax.krylov import programs, storage
from curvax.krylov.lanczos import ASYMMETRY_LIMIT, Lanczos, Matrix
from curvax.results import warn

# Products of a sampled verification.
SAMPLES = 3


@dataclasses.dataclass
class Certificate:
    """Of the first k rows of the basis.

    Attributes:
        values: `(k,)` Rayleigh quotients.
        residuals: `(k,)` measured norms.
        noise: the part of the residuals that the recurrence did not predict, relative to `scale`.
    """

    values: Matrix
    residuals: Matrix
    noise: float


def measure(state: Lanczos, predicted: Matrix, scale: float) -> Certificate:
    """Multiply each of the first `len(predicted)` rows and take its residual.

    Args:
        state: its rows are the Ritz vectors, after a restart.
        predicted: the residuals that the recurrence estimates.
        scale: |λ|max.
    """
    k, b = len(predicted), state.block
    values, norms = np.zeros(k), np.zeros(k)
    for start in range(0, k, b):
        # The last block may reach back over rows already done, or on over rows that follow.
        stop = min(start + b, k)
        quotients, lengths = _residuals(state, start)
        values[start:stop] = quotients[: stop - start]
        norms[start:stop] = lengths[: stop - start]
    return Certificate(values, norms, _unexplained(norms, predicted, scale))


# A function of its own, as `_unpredicted` is: its vectors are gone before the next are made.
def _residuals(state: Lanczos, start: int) -> tuple[Matrix, Matrix]:
    """The Rayleigh quotients and the residual norms of the block of rows from `start`."""
    products = state.multiply(state.load(start), part="verification")
    quotients, lengths = programs.residuals(state.clock, state.basis, products, np.int32(start))
    return np.asarray(quotients), np.asarray(lengths)


def measure_sampled(state: Lanczos, values: Matrix, predicted: Matrix, scale: float) -> Certificate:
    """Check random signed sums of the pairs: `SAMPLES` products, whatever k is.

    The recurrence says `A X = X Θ + Q_new E` (see `lanczos`). For signs σ the norm of what is left,
    `‖A Xσ − XΘσ − Q_new E σ‖²`, has the expectation `Σ‖n_i‖²` of the errors `n_i` that it does not
    predict; the largest is charged in full to every pair.
    """
    rng = np.random.default_rng(state.matvecs)
    signs = rng.choice([-1.0, 1.0], size=(SAMPLES, len(values)))
    excess = max(_unpredicted(state, sign, values) for sign in signs)
    noise = math.sqrt(excess) / scale if scale > 0 else 0.0
    return Certificate(values.copy(), np.sqrt(predicted**2 + excess), noise)


def _unpredicted(state: Lanczos, sign: Matrix, values: Matrix) -> float:
    """`‖A Xσ − XΘσ − Q_new E σ‖²`."""
    k, used = len(values), state.used
    pairs, recurrence = np.zeros((2, 1, state.rows), state.op.dtype)
    pairs[0, :k], recurrence[0, :k] = sign, sign * values
    recurrence[0, used : used + state.block] = state.coupling[:, :k] @ sign
    vector = programs.combine(state.clock, state.basis, pairs)
    product = state.multiply(vector, part="verification")
    expected = programs.combine(state.clock, state.basis, recurrence)
    return float(programs.squared_distance(state.clock, product, expected))


def _unexplained(measured: Matrix, predicted: Matrix, scale: float) -> float:
    gap = np.sqrt(np.maximum(measured**2 - predicted**2, 0.0)).max(initial=0.0)
    return float(gap / scale) if scale > 0 else 0.0


def orthogonality(state: Lanczos, k: int) -> float:
    """`max |XᵀX − I|` over the first k rows of the basis."""
    gram = np.asarray(programs.gram(state.clock, state.basis, np.zeros(k, np.int32)))
    return float(np.abs(gram - np.eye(k)).max())


def estimate_errors(values: Matrix, residuals: Matrix, others: Any) -> Matrix:
    """`min(‖r‖, ‖r‖²/gap)` (Kato-Temple), the gap to the nearest other Ritz value being estimated.

    Args:
        values: `(k,)` the values found.
        residuals: `(k,)` their residual norms.
        others: further Ritz values, not among `values`.
    """
    everything = np.concatenate([values, np.asarray(others, np.float64)])
    distance = np.abs(values[:, None] - everything[None, :])
    distance[range(len(values)), range(len(values))] = np.inf
    gap = distance.min(axis=1)
    # Where no other value is known, nothing is known of the gap.
    with np.errstate(divide="ignore", invalid="ignore"):
        quadratic = np.where((gap > 0) & np.isfinite(gap), residuals**2 / gap, np.inf)
    return np.minimum(residuals, quadratic)


def attainable(dtype: Any, basis_dtype: Any) -> float:
    """The relative residual of products in `dtype`, on stored vectors, that can be relied on."""
    return max(4 * float(np.finfo(dtype).eps), storage.floor(basis_dtype))


def effective_tolerance(tol: float, noise: float, dtype: Any, basis_dtype: Any) -> float:
    """`tol`, or more where the measured noise of the products does not allow it.

    Twice the noise, since that is measured on a few vectors; but noise that an operator of a
    symmetric matrix cannot have excuses nothing.
    """
    return max(tol, min(2 * noise, 2 * ASYMMETRY_LIMIT), attainable(dtype, basis_dtype))


def warn_raised(tol: float, effective: float, dtype: Any, basis_dtype: Any) -> None:
    """Warn if a tolerance was raised, unless it was 0, which asks for just that."""
    if not effective > tol > 0:
        return
    products, stored = np.dtype(dtype).name, np.dtype(basis_dtype).name
    where, remedy = f"the noise of the products in {products}", "tol_effective"
    if storage.floor(basis_dtype):
        where = f"a basis stored in {stored}"
        remedy = f"tol_effective; basis_dtype={products!r} allows less"
    warn(
        f"tol = {tol:.3g} is below what {where} allows; {effective:.3g} was applied (see {remedy})"
    )
