"""One estimate of a trace: its products, its budget, its progress, its result."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.compiled import Clock
from curvax.estimators import probes, programs
from curvax.estimators.arguments import (
    FEWEST_SAMPLES,
    ROUNDINGS,
    interval,
    missing_interval,
)
from curvax.interrupt import InterruptFlag
from curvax.krylov import programs as krylov
from curvax.operators.algebra import orthonormal_rows
from curvax.operators.base import Operator
from curvax.results import EigenResult, TraceProgress, TraceResult, warn

# The part of the products that go into the vectors of a sketch: the rest multiply its basis, or
# are samples of what it leaves. So many products there are for each sample.
SKETCH_PART = {"hutch++": 3, "xtrace": 2, "xnystrace": 1}

# Roundings of a product, in units of eps times the largest eigenvalue, that pairs are checked to.
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
    """The part of a trace that a solve's pairs give.

    With X the vectors and P = I − XᵀX, `tr A = tr(X A Xᵀ) + tr(P A P)`, whether or not they are
    eigenvectors.

    Attributes:
        vectors: `(d, n)` orthonormal rows, or None.
        count: d.
        value: the sum of the Rayleigh quotients.
        rounding: what their own inexactness may amount to.
        matvecs: products made to check them.
    """

    vectors: Array | None = None
    count: int = 0
    value: float = 0.0
    rounding: float = 0.0
    matvecs: int = 0

    @classmethod
    def of(cls, op: Operator, result: EigenResult | None, block: int, clock: Clock) -> "Known":
        """Take pairs from a result, checked by one product of a block.

        Raises:
            TypeError: not an `EigenResult`.
            ValueError: no vectors, too many, values not certified, or pairs of another operator.
        """
        if result is None:
            return cls()
        flat = _flat(op, result)
        _check_pairs(op, result, flat, block, clock)
        rounding = ROUNDINGS * float(jnp.finfo(op.dtype).eps)
        rounding *= float(np.linalg.norm(result.eigenvalues))
        rounding += result.orthogonality * float(np.sum(np.abs(result.eigenvalues)))
        total = float(np.sum(result.eigenvalues))
        return cls(orthonormal_rows(flat), len(flat), total, rounding, block)


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
    op: Operator, result: EigenResult, vectors: Array, block: int, clock: Clock
) -> None:
    """Multiply combinations of pairs, of random signs, to see that they are this operator's.

    Raises:
        ValueError: a product is further from what the values say than the residuals allow.
    """
    values = np.asarray(result.eigenvalues, np.float64)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (block, len(values)))
    mix, mixed = (jnp.asarray(rows, op.dtype) for rows in (signs, signs * values))
    products = krylov.multiply(clock, op, krylov.combine(clock, vectors, mix))
    expected = krylov.combine(clock, vectors, mixed)
    rest = float(np.asarray(krylov.squared_distance(clock, products, expected))) ** 0.5
    size = float(np.abs(values).max())
    noise = _PAIRS_ROUNDING * float(jnp.finfo(op.dtype).eps) * size * math.sqrt(len(values))
    allowed = math.sqrt(block) * (3 * float(np.sum(result.residuals)) + noise)
    if not rest <= allowed:
        raise ValueError(
            f"deflate must hold pairs of this very operator: ‖A x − Σ λᵢ xᵢ‖ is {rest:.2g} for "
            f"x = Σ ± xᵢ, where their residuals allow {allowed:.2g}; solve again for other "
            "parameters, batches or filters"
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
        return block if off is None else programs.project_off(self.clock, off, block)

    def multiply(self, block: Array, keep: bool = True) -> Array:
        """The products of a block, which is consumed unless `keep`; finished when this returns."""
        with self.clock.part("products"):
            self.matvecs += len(block)
            # The program consumes its argument, and is the one that the eigensolver has compiled.
            given = jnp.copy(block) if keep else block
            return jax.block_until_ready(krylov.multiply(self.clock, self.op, given))

    def forms(self, block: Array, products: Array) -> tuple[Any, Any, Any]:
        """`zᵀw`, `zᵀz` and `wᵀw` of rows and their products, `(b,)` NumPy arrays.

        Raises:
            FloatingPointError: a product is not finite.
        """
        zw, zz, ww = (np.asarray(x) for x in programs.forms(self.clock, block, products))
        if not np.isfinite(ww).all():
            report_nonfinite(self.op, products, self.matvecs)
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
            warn(
                f"the standard error is {stderr:.3g} after {self.matvecs} products, above "
                f"until={until:.3g}: {_remedy(self.matvecs, stderr / until)}"
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
        ends = interval(total, stderr, count, rounding, stopped)
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
            seconds={**self.clock.seconds, "total": self.clock.total()},
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


def report_nonfinite(op: Operator, products: Array, number: int) -> None:
    """Raise for products that are not finite, with the names of the leaves.

    Raises:
        FloatingPointError: always.
    """
    leaves = jax.tree.leaves(op.unravel(products))
    counts = [
        (name, int(jnp.sum(~jnp.isfinite(leaf))), leaf.size)
        for name, leaf in zip(op.space.names, leaves, strict=True)
    ]
    bad = [f"{name or 'the vector'} ({c} of {size})" for name, c, size in counts if c]
    raise FloatingPointError(
        f"product {number} of the operator is not finite; NaN or infinite entries in: "
        f"{', '.join(bad)}"
    )
