"""What is measured of the pairs that a solve found, with products made after it."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from curvax.krylov import programs
from curvax.krylov.lanczos import ASYMMETRY_LIMIT, Lanczos, Matrix
from curvax.results import warn


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
        products = state.multiply(start, part="verification")
        with jax.enable_x64(True):
            quotients, lengths = programs.run(
                state.clock, programs.residuals, state.basis, products, np.int32(start)
            )
        stop = min(start + b, k)
        values[start:stop] = np.asarray(quotients)[: stop - start]
        norms[start:stop] = np.asarray(lengths)[: stop - start]
    return Certificate(values, norms, _unexplained(norms, predicted, scale))


def measure_sampled(
    state: Lanczos, values: Matrix, predicted: Matrix, scale: float, samples: int = 3
) -> Certificate:
    """Check random signed sums of the pairs: `samples` products, whatever k is.

    The recurrence says `A X = X Θ + Q_new E` (see `lanczos`). For signs σ the norm of what is left,
    `‖A Xσ − XΘσ − Q_new E σ‖²`, has the expectation `Σ‖n_i‖²` of the errors `n_i` that it does not
    predict; the largest is charged in full to every pair.
    """
    rng = np.random.default_rng(state.matvecs)
    signs = rng.choice([-1.0, 1.0], size=(samples, len(values)))
    excess, k, used = 0.0, len(values), state.used
    for sign in signs:
        weights = np.zeros((2, used + state.block), state.op.dtype)
        weights[0, :k], weights[1, :k] = sign, sign * values
        weights[1, used:] = state.coupling[:, :k] @ sign
        vectors = programs.run(state.clock, programs.combine, state.basis, weights)
        with state.clock.part("verification"):
            products = programs.run(state.clock, programs.multiply, state.op, vectors[:1])
            state.matvecs += 1
        difference = np.asarray(products[0] - vectors[1], np.float64)
        excess = max(excess, float(difference @ difference))
    noise = math.sqrt(excess) / scale if scale > 0 else 0.0
    return Certificate(values.copy(), np.sqrt(predicted**2 + excess), noise)


def _unexplained(measured: Matrix, predicted: Matrix, scale: float) -> float:
    gap = np.sqrt(np.maximum(measured**2 - predicted**2, 0.0)).max(initial=0.0)
    return float(gap / scale) if scale > 0 else 0.0


def orthogonality(state: Lanczos, k: int) -> float:
    """`max |XᵀX − I|` over the first k rows of the basis."""
    like = np.zeros(k, np.int32)
    with jax.enable_x64(True):
        gram = np.asarray(programs.run(state.clock, programs.gram, state.basis, like))
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
    with np.errstate(divide="ignore", invalid="ignore"):
        quadratic = np.where(gap > 0, residuals**2 / gap, np.inf)
    return np.minimum(residuals, quadratic)


def rounding_floor(dtype: Any) -> float:
    """The relative residual that products in `dtype` can reach at best."""
    return float(4 * np.finfo(dtype).eps)


def effective_tolerance(tol: float, noise: float, dtype: Any) -> float:
    """`tol`, or more where the measured noise of the products does not allow it.

    Twice the noise, since that is measured on a few vectors; but noise that an operator of a
    symmetric matrix cannot have excuses nothing.
    """
    return max(tol, min(2 * noise, 2 * ASYMMETRY_LIMIT), rounding_floor(dtype))


def warn_raised(tol: float, effective: float, dtype: Any) -> None:
    """Warn if a tolerance was raised, unless it was 0, which asks for just that."""
    if effective > tol > 0:
        warn(
            f"tol = {tol:.3g} is below what the noise of the products in {np.dtype(dtype).name} "
            f"allows; {effective:.3g} was applied (see tol_effective)"
        )
