"""The sharpness of a loss, followed through training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import reject_tracers
from curvax.device import programs
from curvax.device.programs import solve_clock
from curvax.krylov.eigsh import eigsh
from curvax.krylov.failures import Explained
from curvax.krylov.scaling import check_range, in_range
from curvax.krylov.start import unit_vectors
from curvax.operators.base import Operator
from curvax.operators.conversion import as_operator, original_errors
from curvax.options import takes_options
from curvax.results import EigenResult, Progress

# So many steps in a row rest on one product each: then a solve looks for what has overtaken.
_MOST_CHECKS = 8


@takes_options()
def sharpness(
    A: Any, previous: EigenResult | None = None, *, tol: float = 1e-2, seed: int = 0
) -> EigenResult:
    """The largest eigenvalue, as of the Hessian along a training run.

    Follow it with `op = op.at(params)` and `result = sharpness(op, result)`: nothing is compiled
    again. If the last eigenvector still meets the tolerance, one product measures that, at most
    eight times in a row; if not, a solve starts from it, with a tenth of a random vector mixed in,
    which where it has moved far takes as many products as one from scratch.

    Args:
        A: see `eigsh`.
        previous: the result of an earlier step; None for a solve from scratch.
        tol: allowed residual relative to the largest absolute eigenvalue.
        seed: see `eigsh`.

    Returns:
        One pair, its residual measured. That no larger eigenvalue was missed is not proved, less
        so by one product: an eigenvalue that overtakes the one followed, also in parameters that
        this has no part of, is seen when that moves, or after eight steps. `num_matvecs` is 0
        where one product was all.

    Raises:
        TypeError: as for `eigsh`, or `previous` is not a result with its eigenvector.
        ValueError: as for `eigsh`.
        FloatingPointError: a product is not finite, or depends on numbers read as zero.
        MemoryError: as for `eigsh`.
        RuntimeError: as for `eigsh`.

    References:
        J. Cohen et al., "Gradient descent on neural networks typically occurs at the edge of
        stability" (ICLR 2021), which follows this number.
    """
    reject_tracers("sharpness", A, previous)
    op = as_operator(A)

    def solve(v0: Array | None) -> EigenResult:
        return eigsh(op, 1, which="LA", tol=tol, v0=v0, seed=seed, block_size=1)

    if previous is None:
        return solve(None)
    if not isinstance(previous, EigenResult) or previous.eigenvectors is None:
        raise TypeError("previous must be an EigenResult with its eigenvector, or None")
    start = unit_vectors(op, previous)[:1]
    checks = _checks(previous)
    checked = _may_hold(checks, tol)
    if checked:
        with Explained(op), original_errors(op):
            good = in_range(op, lambda scaled: _still_good(scaled, start, tol, seed))
        if good is not None:
            return dataclasses.replace(good, history=(*checks, *good.history))
    result = solve(start)
    return dataclasses.replace(result, num_verification=result.num_verification + checked)


def _checks(result: EigenResult) -> tuple[Progress, ...]:
    """The checks by one product since the last solve."""
    return () if result.num_matvecs else result.history


def _may_hold(checks: tuple[Progress, ...], tol: float) -> bool:
    """Whether the residual, if it grows as it did last, is within `tol` once more."""
    if len(checks) >= _MOST_CHECKS:
        return False
    if len(checks) < 2:
        return True
    before, last = (check.residual for check in checks[-2:])
    return 2 * last - before <= tol


def _still_good(op: Operator, vector: Array, tol: float, seed: int) -> EigenResult | None:
    """The result that one product gives, if its residual is within the tolerance."""
    clock = solve_clock()
    with clock.part("products"):
        product = jax.block_until_ready(programs.multiply(clock, op, jnp.copy(vector)))
    nothing = np.int32(0), np.int32(0), np.zeros(1), np.zeros((1, 1))
    values, residuals, _ = (
        np.asarray(x) for x in programs.residuals(clock, vector, product, *nothing)
    )
    check_range(op, float(np.hypot(values[0], residuals[0])))
    if not residuals[0] <= tol * values[0]:
        return None
    check = Progress(
        matvecs=1,
        converged=1,
        k=1,
        residual=float(residuals[0] / values[0]) if values[0] > 0 else 0.0,
        tol=tol,
        max_matvecs=1,
        restarts=0,
        largest=float(values[0]),
        seconds=clock.total(),
    )
    return EigenResult.measured(
        values,
        residuals,
        lambda order: op.unravel(vector),
        estimated_errors=residuals,
        converged=np.ones(1, bool),
        complete=None,
        orthogonality=float(jnp.abs(jnp.vdot(vector, vector, precision="highest") - 1)),
        noise=0.0,
        tol_effective=np.full(1, tol),
        num_matvecs=0,
        num_verification=1,
        num_restarts=0,
        block_size=1,
        seed=seed,
        history=[check],
        clock=clock,
    )
