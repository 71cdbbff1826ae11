"""`log_det`: the logarithm of a determinant, with an error bar."""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri

from curvax.compiled import Clock
from curvax.estimators import arguments
from curvax.estimators.quadrature import (
    Quadrature,
    Request,
    check_request,
    lanczos_runs,
    mean_and_variance,
    radau,
)
from curvax.estimators.recurrence import Matrix
from curvax.interrupt import InterruptFlag
from curvax.operators.base import Operator
from curvax.operators.matrix import as_operator, original_errors
from curvax.results import EigenResult, TraceProgress, TraceResult, warn

# What rounding makes of a zero eigenvalue, in units of the roundoff of the largest.
_ROUNDING = 10.0


def log_det(
    A: Any,
    *,
    damping: float = 0.0,
    num_runs: int = 10,
    num_steps: int = 50,
    deflate: EigenResult | None = None,
    seed: int | None = None,
    block_size: int | Literal["auto"] = "auto",
) -> TraceResult:
    """Estimate `log det(A + damping·I)`, of a positive definite matrix, by Lanczos quadrature.

    It is the trace of the logarithm: n times the mean of `zᵀ log(A + damping·I) z` over random unit
    vectors z, each by `num_steps` Lanczos steps in the memory of three vectors.

    Args:
        A: a curvax operator, a dense or SciPy sparse symmetric array, or anything with `shape`,
            `dtype` and `matvec`.
        damping: added to every eigenvalue; not negative.
        num_runs: random starts.
        num_steps: Lanczos steps of each run, at most n. How many are needed grows with the root of
            the condition number of `A + damping·I`.
        deflate: what `eigsh` returned for this operator: the logarithms of its values are added as
            they are, and only the rest is estimated.
        seed: seed of the starts. Run i depends on the seed and on i alone, to rounding whatever
            `block_size` is. Drawn if None, and recorded in the result.
        block_size: runs side by side, as one product of a block, up to 32. By default 1 on a CPU,
            else 4.

    Returns:
        The estimate (`method` is `"lanczos"`), with one sample per run. The standard error is that
        of the random starts, from the variance that uniform starts have. The interval also holds
        what the steps left out may amount to, between the Gauss quadrature, an upper bound, and the
        Gauss-Radau quadrature that begins at the smallest eigenvalue that the runs allow, a lower
        one; a warning says where that is more than the standard error. After Ctrl-C: of the runs
        finished by then, or, if there are none, of those under way.

    Raises:
        TypeError: an argument of a wrong type, or a call inside a transformation such as `jit`.
        ValueError: an argument out of range; `deflate` holds pairs that have not converged; a
            Ritz value, so an eigenvalue below it, says that `A + damping·I` is not positive
            definite to rounding.
        FloatingPointError: a product is not finite.

    References:
        S. Ubaru, J. Chen and Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature", SIAM J. Matrix Anal. Appl. 38 (2017); G. Golub and G. Meurant, "Matrices,
        Moments and Quadrature" (2010), chapters 6 and 11.
    """
    arguments.reject_tracers("log_det", A, deflate)
    op = as_operator(A)
    request = check_request(op, num_runs, num_steps, deflate, seed, block_size)
    damping = _check_damping(damping)
    clock = Clock("products", "recurrence", "host")
    history: list[TraceProgress] = []
    each: list[Quadrature] = []
    made = 0

    def note(products: int, runs: int) -> None:
        nonlocal made
        made = products

    with InterruptFlag() as interrupted, original_errors(op):
        for block in lanczos_runs(op, request, clock, interrupted, note):
            each += block
            with clock.part("host"):
                found = _estimate(op, request, each, damping)
            most = request.num_runs * request.num_steps
            progress = TraceProgress(made, found.value, found.stderr, most, None, clock.total())
            history.append(progress)
        if found.value - found.low > found.stderr and not interrupted:
            warn(
                f"the estimate may be too large by {found.value - found.low:.3g}, more than its "
                f"standard error of {found.stderr:.3g}: raise num_steps "
                f"({request.num_steps}) or damping ({damping:g})"
            )
        half = found.rounding + float(ndtri(0.975)) * found.stderr
        return TraceResult(
            estimate=found.value,
            stderr=found.stderr,
            interval=(found.low - half, found.value + half),
            samples=found.samples,
            method="lanczos",
            distribution="sphere",
            num_matvecs=made,
            num_deflated=request.known.count,
            block_size=request.block_size,
            seed=request.seed,
            history=tuple(history),
            seconds={**clock.seconds, "total": clock.total()},
            interrupted=bool(interrupted),
        )


class _Estimate(NamedTuple):
    """The estimate from the runs so far.

    Attributes:
        value: the estimate, by Gauss quadrature.
        low: that by Gauss-Radau quadrature, a lower bound for the same starts.
        stderr: over the starts.
        rounding: what an error of one rounding in every eigenvalue may amount to.
        samples: one value for each run.
    """

    value: float
    low: float
    stderr: float
    rounding: float
    samples: Matrix


def _estimate(op: Operator, request: Request, each: list[Quadrature], damping: float) -> _Estimate:
    """Estimate, or raise where `A + damping·I` is seen not to be positive definite."""
    eps = float(jnp.finfo(op.dtype).eps)
    damped = [q._replace(nodes=q.nodes + damping) for q in each]
    atoms, rest = request.atoms + damping, op.shape[0] - request.known.count
    scale = max(float(np.abs(x).max(initial=0)) for x in (*(q.nodes for q in damped), atoms))
    rounding = _ROUNDING * eps * scale
    lowest = min(float(x.min(initial=np.inf)) for x in (*(q.nodes for q in damped), atoms))
    if lowest <= rounding:
        least = damping + max(-1.1 * lowest, 0) + 10 * rounding
        raise ValueError(
            f"A + damping·I must be positive definite, but with damping={damping:g} it has a Ritz "
            f"value of {lowest:.3g}, and so an eigenvalue below that (rounding: {rounding:.1g}): "
            f"damping={least:.2g}, or more, is needed"
        )

    def log(nodes: Matrix) -> Matrix:
        return np.log(np.maximum(nodes, rounding / 2))

    mean, variance = mean_and_variance(damped, log, rest)
    end = _lower_end(damped, damping, rounding)
    lower, _ = mean_and_variance([radau(q, end) for q in damped], log, rest)
    known = float(np.sum(np.log(atoms)))
    return _Estimate(
        value=known + rest * mean,
        low=known + rest * min(lower, mean),
        stderr=rest * math.sqrt(variance / len(each)),
        rounding=eps * scale * rest * float(np.mean([q.weights @ (1 / q.nodes) for q in damped])),
        samples=known + rest * np.asarray([q.weights @ log(q.nodes) for q in damped]),
    )


def _lower_end(damped: list[Quadrature], damping: float, rounding: float) -> float:
    """Where the spectrum of `A + damping·I` may begin, for all that the runs have shown.

    At the least Ritz value less its residual, though not below zero, nor below the damping where
    no Ritz value is.
    """
    lowest = min(float(q.nodes[0]) for q in damped)
    reached = min(float(q.nodes[0] - q.residuals[0]) for q in damped) - rounding
    return max(reached, rounding, damping - 2 * rounding if lowest >= damping - rounding else 0.0)


def _check_damping(damping: Any) -> float:
    if isinstance(damping, (bool, str)) or not isinstance(damping, (int, float, np.number)):
        raise TypeError(f"damping must be a number, got {damping!r}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be finite and not negative, got {damping!r}")
    return float(damping)
