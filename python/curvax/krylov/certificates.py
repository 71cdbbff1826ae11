"""What is measured of the pairs that a solve found, with products made after it."""

import dataclasses
import math
from typing import Any

import numpy as np

from curvax.device import programs
from curvax.krylov.lanczos import Lanczos
from curvax.operators.evidence import report_nonfinite
from curvax.program import host
from curvax.typing import BoolArray, Float64Array

# Products of a sampled verification.
SAMPLES = 3


@dataclasses.dataclass
class Pairs:
    """Ritz pairs that lie in the first rows of the basis.

    Attributes:
        values: their Ritz values, the wanted ones first in order of preference.
        predicted: `(k,)` the residuals that the recurrence estimates.
        others: Ritz values that were not wanted.
        doubtful: `(k,)` whether one not wanted, far from converged, could still displace it.
        scale: |λ|max.
        unknown: the norm of what the recurrence does not hold of their residuals.
    """

    values: Float64Array
    predicted: Float64Array
    others: Float64Array
    doubtful: BoolArray
    scale: float
    unknown: float


@dataclasses.dataclass
class Certificate:
    """Of the first k rows of the basis.

    Attributes:
        values: `(k,)` Rayleigh quotients; the Ritz values of pairs that were not measured.
        residuals: `(k,)` measured norms, NaN where none was.
        noise: the part of the residuals that the recurrence did not predict, relative to `scale`.
    """

    values: Float64Array
    residuals: Float64Array
    noise: float


def unmeasured(pairs: Pairs) -> tuple[Pairs, Certificate]:
    """The pairs, and that nothing was measured of them."""
    return pairs, Certificate(pairs.values.copy(), np.full(len(pairs.values), np.nan), 0.0)


def measure(
    state: Lanczos, certificate: Certificate, measured: Any, scale: float, unknown: float
) -> None:
    """Multiply rows of the basis and take their residuals.

    Args:
        state: its first k rows are the Ritz vectors, after a restart.
        certificate: of which nothing was measured; filled in block by block, so that a failure
            loses no more than the block that it comes in.
        measured: `(k,)` bool, which to multiply.
        scale: |λ|max.
        unknown: the norm of what E does not hold of the residuals, known from elsewhere.
    """
    thetas, b, noise = certificate.values.copy(), state.block, 0.0
    k = len(thetas)
    for start in range(0, k, b):
        # The last block may reach back over rows already done, or on over rows that follow.
        stop = min(start + b, k)
        if not measured[start:stop].any():
            continue
        quotients, lengths, errors = _residuals(state, start, thetas)
        certificate.values[start:stop], certificate.residuals[start:stop] = quotients, lengths
        noise = max(noise, float(errors.max()))
    certificate.noise = max(noise - unknown, 0.0) / scale if scale > 0 else 0.0


# A function of its own, as `_unpredicted` is: its vectors are gone before the next are made.
def _residuals(
    state: Lanczos, start: int, values: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Of the block of rows from `start`: Rayleigh quotients, residual norms, and their errors.

    The error is the norm of what the recurrence did not predict, `‖A x − θ x − Q_new E y‖`: the
    difference of the norms would lose it where the residual is large.
    """
    b, used = state.block, state.used
    thetas, coupling = np.zeros(b), np.zeros((b, b))
    known = min(b, len(values) - start)
    thetas[:known] = values[start : start + known]
    coupling[:, :known] = state.coupling[:, start : start + known]
    products = state.multiply(state.load(start))
    arguments = host(np.int32(start)), host(np.int32(used)), host(thetas), host(coupling)
    measured = programs.residuals(state.clock, state.basis, products, *arguments)
    quotients, lengths, errors = (np.asarray(x)[:known] for x in measured)
    if not np.isfinite(errors).all():
        report_nonfinite(state.op, products, state.matvecs)
    return quotients, lengths, errors


def measure_sampled(
    state: Lanczos, values: Float64Array, predicted: Float64Array, scale: float
) -> Certificate:
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


def _unpredicted(state: Lanczos, sign: Float64Array, values: Float64Array) -> float:
    """`‖A Xσ − XΘσ − Q_new E σ‖²`."""
    k, used = len(values), state.used
    pairs, recurrence = np.zeros((2, 1, state.rows), state.op.dtype)
    pairs[0, :k], recurrence[0, :k] = sign, sign * values
    recurrence[0, used : used + state.block] = state.coupling[:, :k] @ sign
    vector = programs.combine(state.clock, state.basis, pairs, state.n)
    product = state.multiply(vector)
    expected = programs.combine(state.clock, state.basis, recurrence, state.n)
    distance = float(programs.squared_distance(state.clock, product, expected))
    if not math.isfinite(distance):
        report_nonfinite(state.op, product, state.matvecs)
    return distance


def orthogonality(state: Lanczos, k: int) -> float:
    """`max |XᵀX − I|` over the first k rows of the basis."""
    gram = np.asarray(programs.gram(state.clock, state.basis, host(np.zeros(k, np.int32)), state.n))
    return float(np.abs(gram - np.eye(k)).max())


def estimate_errors(
    values: Float64Array, residuals: Float64Array, others: Float64Array
) -> Float64Array:
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
