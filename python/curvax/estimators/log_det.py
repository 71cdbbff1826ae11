"""`log_det`: the logarithm of a determinant, with an error bar."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from curvax.arrays import reject_tracers
from curvax.checks import check_number
from curvax.estimators import arguments
from curvax.estimators.quadrature import (
    Quadrature,
    Request,
    check_request,
    gauss,
    lanczos_runs,
    mean_and_variance,
    radau,
)
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.scaling import exponent_of, in_range
from curvax.operators.base import Operator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.options import takes_options
from curvax.program import Clock
from curvax.results import EigenResult, TraceProgress, TraceResult
from curvax.results.units import times
from curvax.typing import Float64Array
from curvax.warnings import warn

# What rounding makes of a zero eigenvalue, in units of the roundoff of the largest.
_ROUNDING = 10.0


@takes_options()
def log_det(
    A: OperatorLike,
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
        num_steps: Lanczos steps of each run, at least 1. No more are made than the space has
            dimensions: n, less the pairs of `deflate`. How many are needed grows with the root of
            the condition number of `A + damping·I`.
        deflate: what `eigsh` returned for this operator: a product of each vector measures its
            value, whose logarithm is added, and only the rest is estimated. Residuals, measured as
            well, widen the interval.
        seed: seed of the starts. Run i depends on the seed and on i alone, to rounding whatever
            `block_size` is. Drawn if None, and recorded in the result.
        block_size: runs side by side, as one product of a block, up to 32. By default 1 on a CPU,
            else 4.

    Returns:
        The estimate (`method` is `"lanczos"`), with one sample per run. The standard error is that
        of the random starts, from the variance that uniform starts have, and the interval is that
        of Student's t where few eigenvalues, seen in few runs, decide. The interval also holds
        what the steps left out may amount to, between the Gauss quadrature, an upper bound, and the
        Gauss-Radau quadrature that begins at the smallest eigenvalue that the runs allow, a lower
        one; a warning says where that is more than the standard error. After Ctrl-C: of the runs
        finished by then, or, if there are none, of those under way.

    Raises:
        TypeError: an argument of a wrong type, or a call inside a transformation such as `jit`.
        ValueError: an argument out of range; an operator measured not to be symmetric; `deflate`
            holds pairs that have not converged, or are measured to be another operator's; a Ritz
            value, so an eigenvalue below it, says that `A + damping·I` is not positive definite to
            rounding.
        FloatingPointError: a product is not finite, or depends on numbers read as zero.
        MemoryError: memory ran out on the way.
        RuntimeError: a compiled kernel could not be run.

    References:
        S. Ubaru, J. Chen and Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature", SIAM J. Matrix Anal. Appl. 38 (2017); G. Golub and G. Meurant, "Matrices,
        Moments and Quadrature" (2010), chapters 6 and 11.
    """
    reject_tracers("log_det", A, deflate)
    op = as_operator(A)
    damping = check_number("damping", damping)
    options = (num_runs, num_steps, deflate, seed, block_size)
    explained = Explained(op, block=arguments.check_block(block_size, op.shape[0]))
    with InterruptFlag() as interrupted, kept(), explained, original_errors(op):
        # A logarithm is not in the operator's units: its shift is taken off where it is made.
        return in_range(
            op,
            lambda scaled: _estimate(scaled, damping, options, interrupted),
            lambda result, exponent: result,
        )


def _estimate(
    op: Operator, damping: float, options: tuple[Any, ...], interrupted: InterruptFlag
) -> TraceResult:
    clock = Clock("products", "recurrence", "host")
    request = check_request(op, clock, *options)
    history: list[TraceProgress] = []
    runs = _Runs(op, request, damping)
    made = 0

    def note(products: int, finished: int) -> None:
        nonlocal made
        made = products

    for block in lanczos_runs(op, request, clock, interrupted, note):
        with clock.part("host"):
            estimate, stderr = runs.add(block)
        most = request.num_runs * request.num_steps
        history.append(TraceProgress(made, estimate, stderr, most, None, clock.total()))
    excess, coupled = estimate - runs.lower_bound(), runs.coupling()
    for size, remedy in (
        (excess, f"raise num_steps ({request.num_steps}) or damping ({damping:g})"),
        (coupled, "deflate pairs that were solved with a smaller tol"),
    ):
        if size > max(stderr, runs.rounding_error()) and not interrupted:
            warn(
                f"the estimate may be too large by {size:.3g}, more than its standard error of "
                f"{stderr:.3g}: {remedy}"
            )
    half = runs.quantile() * stderr + runs.rounding_error()
    return TraceResult(
        estimate=estimate,
        stderr=stderr,
        interval=(estimate - excess - coupled - half, estimate + half),
        samples=runs.samples(),
        method="lanczos",
        distribution="sphere",
        num_matvecs=made + request.deflation.matvecs,
        num_deflated=request.deflation.count,
        block_size=request.block_size,
        seed=request.seed,
        history=tuple(history),
        seconds=clock.parts(),
        interrupted=bool(interrupted),
    )


class _Runs:
    """Lanczos runs of `A + damping·I`, and what they say of the trace of its logarithm."""

    def __init__(self, op: Operator, request: Request, damping: float) -> None:
        exponent = exponent_of(op)
        self._unit = 0.5**exponent
        self._shift = op.shape[0] * exponent * math.log(2)
        self._damping = damping = times(damping, exponent)
        if not math.isfinite(damping):
            raise ValueError(
                f"damping={damping * self._unit:g} is so much larger than A, of the size of "
                f"{self._unit:.2g}, that the determinant is that of damping·I"
            )
        self._eps = float(jnp.finfo(op.dtype).eps)
        self._known = request.deflation
        self._atoms = request.atoms + damping
        self._dimension = op.shape[0] - len(request.atoms)
        self._coefficients: list[tuple[Float64Array, Float64Array]] = []
        self._each: list[Quadrature] = []

    def add(self, block: list[tuple[Float64Array, Float64Array]]) -> tuple[float, float]:
        """Take in more runs: the estimate, by Gauss quadrature, and its standard error.

        Raises:
            ValueError: the operator is seen not to be positive definite.
        """
        self._coefficients += [(alphas + self._damping, betas) for alphas, betas in block]
        self._each += [gauss(*pair) for pair in self._coefficients[len(self._each) :]]
        self._check_definite()
        mean, variance = mean_and_variance(self._each, self._log, self._dimension)
        stderr = self._dimension * math.sqrt(variance / len(self._each))
        return self._trace(mean), stderr

    def samples(self) -> Float64Array:
        """One estimate for each run."""
        means = [float(q.weights @ self._log(q.nodes)) for q in self._each]
        return np.asarray([self._trace(mean) for mean in means])

    def lower_bound(self) -> float:
        """Of what the estimate, an upper bound for the same starts, would be after all steps."""
        end = self._lower_end()
        each = [radau(*pair, end) for pair in self._coefficients]
        return self._trace(float(np.mean([q.weights @ self._log(q.nodes) for q in each])))

    def quantile(self) -> float:
        """Student's t of as many degrees of freedom as the variance is known to.

        That is the variance of `χ²`-distributed masses: with g the logarithms less their mean, each
        run counts as `(Σ g²)²/Σ g⁴` values, from 1, where a single one dominates, to n.
        """
        values = [self._log(q.nodes) for q in self._each]
        pairs = [(q.weights, v) for q, v in zip(self._each, values, strict=True)]
        mean = float(np.mean([weights @ v for weights, v in pairs]))
        second = float(np.mean([weights @ (v - mean) ** 2 for weights, v in pairs]))
        fourth = float(np.mean([weights @ (v - mean) ** 4 for weights, v in pairs]))
        each = self._dimension * second**2 / fourth if fourth > 0 else 1.0
        return float(stdtrit(len(self._each) * max(each, 1.0), 0.975))

    def coupling(self) -> float:
        """By how much the estimate may be too large because deflated vectors have residuals.

        With M and B the parts of `A + damping·I` on those vectors and beside them, R what couples
        them and S = M^-½ R B⁻¹ Rᵀ M^-½, the logarithm lacks `log det(I − S)`. The trace of S is at
        most that of `R Rᵀ M⁻¹` over the smallest eigenvalue of B, and its eigenvalues leave I − S
        above the smallest eigenvalue over the largest of M.
        """
        form = self._known.form + self._damping * np.eye(self._known.count)
        leaks2 = self._known.leaks**2
        if not leaks2.any():
            return 0.0
        diagonal, end = np.diag(form), self._lower_end()
        scaled = form / np.sqrt(np.outer(diagonal, diagonal)) - np.eye(len(form))
        rest = 1 - float(np.linalg.norm(scaled))
        most = 1 - min(end / float(self._atoms.max()), 1.0)
        trace = float(np.sum(leaks2 / diagonal)) / (end * rest) if rest > 0 else math.inf
        whole = min(int(trace / most), len(form)) if math.isfinite(trace) and most else len(form)
        part = min(trace - whole * most, most) if whole < len(form) else 0.0
        return -whole * math.log1p(-most) - math.log1p(-part)

    def rounding_error(self) -> float:
        """What an error of one rounding in every eigenvalue may amount to."""
        inverse = float(np.mean([q.weights @ (1 / q.nodes) for q in self._each]))
        return self._eps * self._scale * inverse * self._dimension

    def _trace(self, mean: float) -> float:
        return float(np.sum(np.log(self._atoms))) + self._dimension * mean - self._shift

    def _log(self, nodes: Float64Array) -> Float64Array:
        return np.log(np.maximum(nodes, self._rounding / 2))

    @property
    def _scale(self) -> float:
        return max(float(np.abs(x).max(initial=0)) for x in self._values())

    @property
    def _rounding(self) -> float:
        return _ROUNDING * self._eps * self._scale

    def _values(self) -> list[Float64Array]:
        return [*(q.nodes for q in self._each), self._atoms]

    def _check_definite(self) -> None:
        lowest = min(float(x.min(initial=np.inf)) for x in self._values())
        if lowest <= self._rounding:
            least = self._damping + max(-1.1 * lowest, 0) + 10 * self._rounding or 1e-3
            damping, lowest, rounding, least = (
                self._unit * x for x in (self._damping, lowest, self._rounding, least)
            )
            raise ValueError(
                f"A + damping·I must be positive definite, but with damping={damping:g} it "
                f"has a Ritz value of {lowest:.3g}, and so an eigenvalue below that (rounding: "
                f"{rounding:.1g}): damping={least:.2g}, or more, is needed"
            )

    def _lower_end(self) -> float:
        """Where the spectrum of `A + damping·I` may begin, for all that the runs have shown.

        At the least Ritz value less its residual, though not below zero, nor, where no Ritz value
        of A is negative, below the damping.
        """
        rounding = self._rounding
        lowest = min(float(q.nodes[0]) for q in self._each)
        reached = min(float(q.nodes[0] - q.residuals[0]) for q in self._each) - rounding
        damped = self._damping - 2 * rounding if lowest >= self._damping - rounding else 0.0
        return max(reached, rounding, damped)
