"""One estimate of a trace: its products, its budget, its progress, its result."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.device import probes, probing, programs
from curvax.estimators.arguments import (
    FEWEST_SAMPLES,
    ROUNDINGS,
    interval,
    missing_interval,
)
from curvax.interrupt import InterruptFlag
from curvax.krylov.scaling import check_range, exponent_of
from curvax.operators.algebra import orthonormal_rows
from curvax.operators.base import Operator
from curvax.operators.evidence import report_nonfinite
from curvax.program import Clock
from curvax.results import EigenResult, TraceProgress, TraceResult
from curvax.results.units import rescaled
from curvax.typing import Float64Array
from curvax.warnings import warn

# The part of the products that go into the vectors of a sketch: the rest multiply its basis, or
# are samples of what it leaves. So many products there are for each sample.
SKETCH_PART = {"hutch++": 3, "xtrace": 2, "xnystrace": 1}

# Roundings of a product, in units of eps times the size of the values, that pairs are checked to.
_PAIRS_ROUNDING = 1e3


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that steers an estimate.

    Attributes:
        planned: the products asked for.
        limit: the most products; more than planned where a standard error is asked for.
        distribution: of the probes.
        until: the standard error asked for, or None.
        seed: of the probes.
        block: vectors per product.
        callback: called after each block, or None.
    """

    planned: int
    limit: int
    distribution: str
    until: float | None
    seed: int
    block: int
    callback: Callable[[TraceProgress], Any] | None


@dataclasses.dataclass(frozen=True)
class Known:
    """The part of a trace that a solve's vectors give, measured on the operator at hand.

    With X the vectors and P = I − XᵀX, `tr A = tr(X A Xᵀ) + tr(P A P)`, whether or not they are
    eigenvectors, and whichever operator they were found for.

    Attributes:
        vectors: `(d, n)` orthonormal rows X, or None.
        count: d.
        form: `(d, d)` float64, `X A Xᵀ`.
        leaks: `(d,)` the norms of `P A x`.
        atoms: `(d,)` float64, the eigenvalues of the form; those of the solve where they differ by
            no more than the products' roundings.
        rounding: what errors of the products may amount to in the trace of the form.
        matvecs: products made to measure all that.
    """

    vectors: Array | None = None
    count: int = 0
    form: Float64Array = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    leaks: Float64Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    atoms: Float64Array = dataclasses.field(default_factory=lambda: np.zeros(0))
    rounding: float = 0.0
    matvecs: int = 0

    @property
    def value(self) -> float:
        """The known part of the trace."""
        return float(np.sum(self.atoms))

    @classmethod
    def of(cls, op: Operator, result: EigenResult | None, block: int, clock: Clock) -> "Known":
        """Take the vectors of a result, and multiply them.

        Raises:
            TypeError: not an `EigenResult`.
            ValueError: no vectors, too many, values not certified, or pairs of another operator.
        """
        if result is None:
            return cls()
        if isinstance(result, EigenResult):
            result = rescaled(result, exponent_of(op))
        rows = orthonormal_rows(_flat(op, result))
        form, leaks, matvecs = _multiply_rows(op, rows, block, clock)
        values = np.asarray(result.eigenvalues, np.float64)
        check_range(op, float(max(np.abs(values).max(), np.abs(form).max())))
        size, eps = float(np.linalg.norm(values)), float(jnp.finfo(op.dtype).eps)
        _check_pairs(op, result, form, leaks, _PAIRS_ROUNDING * eps * size)
        noise = float(np.linalg.norm(form - form.T)) / 2
        form = (form + form.T) / 2
        atoms = np.asarray(np.linalg.eigvalsh(form)[::-1], np.float64)
        if np.abs(atoms - values).max() <= ROUNDINGS * eps * size:
            atoms = values
        gram = np.asarray(probing.inner(clock, rows, rows))
        skew = float(np.abs(gram - np.eye(len(gram))).max()) * float(np.sum(np.abs(atoms)))
        rounding = ROUNDINGS * eps * size + noise + skew
        return cls(rows, len(rows), form, leaks, atoms, rounding, matvecs)


def _multiply_rows(
    op: Operator, rows: Array, block: int, clock: Clock
) -> tuple[Float64Array, Float64Array, int]:
    """`X A Xᵀ` as computed, the norms of what the products leave beside X, and their number."""
    d = len(rows)
    form, leaks, made = np.zeros((d, d)), np.zeros(d), 0
    for first in range(0, d, block):
        # Whole blocks: for another number of vectors the product is compiled again.
        picked = np.arange(first, first + block) % d
        taken = programs.take(clock, rows, jnp.asarray(picked, jnp.int32))
        products = programs.multiply(clock, op, taken)
        made += block
        form[:, picked] = np.asarray(probing.inner(clock, rows, products))
        if not np.isfinite(form[:, picked]).all():
            report_nonfinite(op, products, made)
        left = probing.project_off(clock, rows, products)
        leaks[picked] = np.sqrt(np.asarray(probing.forms(clock, left, left)[2]))
    return form, leaks, made


def _flat(op: Operator, result: Any) -> Array:
    if not isinstance(result, EigenResult):
        raise TypeError(
            f"deflate must be an EigenResult, as eigsh returns, got {type(result).__name__}"
        )
    if result.eigenvectors is None:
        raise ValueError("deflate has no eigenvectors: solve with return_eigenvectors=True")
    if not result.certified:
        raise ValueError(
            "deflate must hold values of this operator, but these are means over microbatches: "
            "solve with eigsh, or power_iteration without resample"
        )
    flat = op.space.ravel(result.eigenvectors, batch_axes=1, what="deflate.eigenvectors")
    if len(flat) >= op.shape[0]:
        raise ValueError(
            f"deflate must hold fewer pairs than n = {op.shape[0]}, got {len(flat)}: their "
            "eigenvalues are the trace"
        )
    return flat


def _check_pairs(
    op: Operator, result: EigenResult, form: Float64Array, leaks: Float64Array, rounding: float
) -> None:
    """Compare products of a result's vectors with what its values and residuals say.

    Raises:
        ValueError: they are further from the values than the residuals allow.
    """
    values = np.asarray(result.eigenvalues, np.float64)
    rest = math.hypot(float(np.linalg.norm(form - np.diag(values))), float(np.linalg.norm(leaks)))
    skew = result.orthogonality * float(np.sum(np.abs(values)))
    allowed = 3 * float(np.sum(result.residuals)) + skew + rounding
    if not rest <= allowed:
        unit = 0.5 ** exponent_of(op)
        raise ValueError(
            f"deflate must hold pairs of this very operator: the residuals ‖A xᵢ − λᵢ xᵢ‖ are "
            f"{unit * rest:.2g} together, where those of the result allow {unit * allowed:.2g}; "
            "solve again for "
            "other parameters, batches or filters"
        )


class Run:
    """What the methods share."""

    def __init__(
        self,
        op: Operator,
        settings: Settings,
        interrupted: InterruptFlag,
        clock: Clock,
        known: Known,
    ) -> None:
        self.op = op
        self.settings = settings
        self.interrupted = interrupted
        self.clock = clock
        self.known = known
        self.matvecs = 0
        self.history: list[TraceProgress] = []
        self._longest = 0.0

    @property
    def left(self) -> int:
        """Products that may still be made."""
        return self.settings.limit - self.matvecs

    @property
    def dimension(self) -> int:
        """The dimension of the space on which the trace is unknown."""
        return self.op.shape[0] - self.known.count

    @property
    def eps(self) -> float:
        """Relative error of a rounding of the products."""
        return float(jnp.finfo(self.op.dtype).eps)

    def probes(self, first: int, count: int, off: Array | None) -> Array:
        """Rows of the seed's sequence, less their components along the orthonormal rows `off`."""
        like = jnp.zeros(count, jnp.int32)
        seed, distribution = self.settings.seed, self.settings.distribution
        block = probes.draw(self.clock, self.op, like, seed, first, distribution)
        return block if off is None else probing.project_off(self.clock, off, block)

    def multiply(self, block: Array, keep: bool = True) -> Array:
        """The products of a block, which is consumed unless `keep`; finished when this returns."""
        with self.clock.part("products"):
            self.matvecs += len(block)
            # The program consumes its argument, and is the one that the eigensolver has compiled.
            given = jnp.copy(block) if keep else block
            return jax.block_until_ready(programs.multiply(self.clock, self.op, given))

    def forms(self, block: Array, products: Array) -> tuple[Any, Any, Any]:
        """`zᵀw`, `zᵀz` and `wᵀw` of rows and their products, `(b,)` NumPy arrays.

        Raises:
            FloatingPointError: a product is not finite.
            OutOfRange: see `check_range`.
        """
        zw, zz, ww = (np.asarray(x) for x in probing.forms(self.clock, block, products))
        if not np.isfinite(ww).all():
            report_nonfinite(self.op, products, self.matvecs)
        if self.known.vectors is None:
            # What known pairs leave may be zero; they are checked by a product of their own.
            self._longest = max(self._longest, math.sqrt((ww / zz).max()))
            check_range(self.op, self._longest)
        return zw, zz, ww

    def note(self, estimate: float, stderr: float) -> None:
        """Record the state after a block of products, and call back."""
        progress = TraceProgress(
            matvecs=self.matvecs,
            estimate=self.known.value + estimate,
            stderr=stderr,
            max_matvecs=self.settings.limit,
            until=self.settings.until,
            seconds=self.clock.total(),
        )
        self.history.append(progress)
        if self.settings.callback is not None:
            self.settings.callback(progress)

    def reached(self, samples: int, stderr: float) -> bool:
        """Whether the standard error asked for is reached, on samples enough to believe it."""
        until = self.settings.until
        return until is not None and samples >= FEWEST_SAMPLES and stderr <= until

    def warn_if_above(self, stderr: float) -> None:
        """Warn if the standard error asked for was not reached."""
        until = self.settings.until
        if until is not None and not self.interrupted and stderr > until:
            unit = 0.5 ** exponent_of(self.op)
            warn(
                f"the standard error is {unit * stderr:.3g} after {self.matvecs} products, above "
                f"until={unit * until:.3g}: {_remedy(self.matvecs, stderr / until)}"
            )

    def result(
        self,
        method: str,
        estimate: float,
        stderr: float,
        samples: Sequence[float],
        size: float,
        noise: float = 0.0,
    ) -> TraceResult:
        """The result.

        Args:
            method: its name.
            estimate: of the unknown part.
            stderr: its standard error.
            samples: that it is from.
            size: the Frobenius norm of the operator, about, which roundings are relative to.
            noise: errors of the products that were measured.
        """
        s, total = self.settings, self.known.value + estimate
        rounding = self.known.rounding + ROUNDINGS * self.eps * size + noise
        count, stopped = len(samples), s.until is not None
        shared = method in ("xtrace", "xnystrace")
        ends = interval(total, stderr, count, shared, rounding, stopped)
        return TraceResult(
            estimate=total,
            stderr=stderr,
            interval=ends,
            samples=np.asarray(samples, np.float64),
            method=method,
            distribution=s.distribution,
            num_matvecs=self.matvecs + self.known.matvecs,
            num_deflated=self.known.count,
            block_size=s.block,
            seed=s.seed,
            history=tuple(self.history),
            seconds=self.clock.parts(),
            interrupted=bool(self.interrupted),
            no_interval=missing_interval(ends, count, SKETCH_PART.get(method, 1)),
        )


def _remedy(matvecs: int, ratio: float) -> str:
    if not math.isfinite(ratio):
        return "raise max_matvecs"
    return (
        f"raise max_matvecs (to about {matvecs * ratio**2:.2g} if the error falls with the root of "
        "their number), or pass a solve's pairs as deflate="
    )
