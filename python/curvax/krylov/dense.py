"""The whole matrix, where it is no larger than the basis would be."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from curvax.blas import one_thread
from curvax.device import programs
from curvax.interrupt import InterruptFlag
from curvax.krylov.certificates import estimate_errors
from curvax.krylov.plan import Plan
from curvax.krylov.request import Request
from curvax.krylov.scaling import check_range
from curvax.krylov.tolerance import Tolerance
from curvax.operators.base import Operator
from curvax.operators.evidence import ASYMMETRY_LIMIT, report_nonfinite
from curvax.operators.precision import more_accurate
from curvax.program import Clock
from curvax.results import EigenResult, Progress
from curvax.typing import BoolArray, Float64Array, FloatArray
from curvax.warnings import warn_unconverged


class DenseSolve:
    """Multiplies the identity row by row, so that an interrupt keeps the rows known so far.

    With the first m rows of A known, the pairs are those of A projected onto the first m unit
    vectors; with all n, those of A.
    """

    def __init__(
        self,
        op: Operator,
        request: Request,
        plan: Plan,
        interrupted: InterruptFlag,
        clock: Clock,
    ) -> None:
        self.op = op
        self.request = request
        self.plan = plan
        self.interrupted = interrupted
        self.clock = clock
        self.history: list[Progress] = []
        # The first rows of the matrix, and what was measured of the first pairs.
        self._rows = np.empty((0, 0))
        self._known = 0
        self._quotients = self._residuals = np.zeros(0)
        self._failed = False
        self.tolerance = Tolerance(
            request.wanted, request.tol, request.relative_to, op.dtype, op.dtype
        )

    def run(self) -> EigenResult:
        """Form the matrix, decompose it in float64, and measure the residuals of the pairs."""
        n = self.op.shape[0]
        with self.clock.part("products"):
            self._rows = np.empty((n, n))
            for first, products in self._products(np.eye(n, dtype=self.op.dtype)):
                self._known = first + len(products)
                self._rows[first : self._known] = products
                self._note()
                if self.interrupted:
                    break
        return self._report()

    @property
    def made(self) -> int:
        """Products so far."""
        return self._known + len(self._residuals)

    def salvage(self) -> EigenResult | None:
        """What is known after a failure, without another product; None if that is nothing."""
        if not self._known:
            return None
        self._failed = True
        try:
            return self._report()
        except Exception:  # as no memory, or numbers out of range: the failure itself is raised
            return None

    def _report(self) -> EigenResult:
        wanted, n, m = self.request.wanted, self.op.shape[0], self._known
        rows = self._rows[:m]
        # By the largest entry first: squares of float64 leave its range, too.
        largest = float(np.abs(rows).max())
        check_range(self.op, largest)
        noise = _asymmetry(self.op, rows[:, :m])
        with self.clock.part("host"), one_thread():
            values, vectors = np.linalg.eigh((rows[:, :m] + rows[:, :m].T) / 2)
            chosen = wanted.order(values)[: wanted.k]
            x = np.zeros((len(chosen), n), self.op.dtype)
            x[:, :m] = vectors[:, chosen].T
            scale = float(np.abs(values).max())
            self.history[-1] = self.history[-1]._replace(largest=scale)
            # What the rows say of each residual: the part of A x outside the first m entries.
            predicted = np.linalg.norm(vectors[:, chosen].T @ rows[:, m:], axis=1)
        others = np.delete(values, chosen)
        values, stopped = values[chosen], bool(self.interrupted) or self._failed
        if not stopped:
            with self.clock.part("verification"):
                self._measure(x)
        made = len(self._residuals)
        measured = np.arange(len(x)) < made
        residuals = np.append(self._residuals, np.full(len(x) - made, np.nan))
        values[:made] = self._quotients
        known = np.where(measured, residuals, predicted)
        if not stopped:
            noise = max(noise, float(residuals.max() / scale) if scale > 0 else 0.0)
            self.tolerance.admit(noise)
        parts = self.tolerance.parts(values, known, scale)
        errors = estimate_errors(values, known, others)
        converged = measured & (known <= parts * scale)
        if not stopped:
            self._warn(converged)
        wide, keep = x.astype(np.float64), self.request.return_eigenvectors
        return EigenResult.measured(
            values,
            residuals,
            lambda down: self.op.unravel(jnp.asarray(x[down])) if keep else None,
            estimated_errors=errors,
            converged=converged,
            complete=None if stopped else True,
            orthogonality=float(np.abs(wide @ wide.T - np.eye(len(x))).max()),
            noise=noise,
            tol_effective=parts,
            num_matvecs=m,
            num_verification=made,
            num_restarts=0,
            block_size=self.plan.block_size,
            seed=self.request.seed,
            history=self.history,
            clock=self.clock,
            interrupted=stopped,
        )

    def _products(self, x: np.ndarray) -> Iterator[tuple[int, Float64Array]]:
        """The products of the rows of x, in float64, block by block: the first row, and they."""
        block = self.plan.block_size
        for first in range(0, len(x), block):
            # The last block reaches back over rows already done: one program serves all.
            start = max(0, min(first, len(x) - block))
            # A copy: what `multiply` consumes must not share the memory of NumPy's array.
            piece = jnp.array(x[start : start + block])
            products = np.asarray(programs.multiply(self.clock, self.op, piece), np.float64)
            self._check_finite(products[first - start :], first)
            yield first, products[first - start :]

    def _note(self) -> None:
        n, k, done = self.op.shape[0], self.request.wanted.k, self._known
        progress = Progress(
            matvecs=done,
            converged=k if done == n else 0,
            k=k,
            residual=0.0 if done == n else float("inf"),
            tol=self.request.tol,
            max_matvecs=self.plan.max_matvecs,
            restarts=0,
            largest=float(np.abs(np.diagonal(self._rows[:done, :done])).max()),
            seconds=self.clock.total(),
        )
        self.history.append(progress)
        if self.request.callback is not None:
            self.request.callback(progress)

    def _measure(self, x: FloatArray) -> None:
        """Rayleigh quotients and residual norms, from fresh products."""
        for first, products in self._products(x):
            wide = x[first : first + len(products)].astype(np.float64)
            squares = np.sum(wide**2, axis=1)
            quotients = np.sum(wide * products, axis=1) / squares
            norms = np.linalg.norm(products - quotients[:, None] * wide, axis=1)
            self._quotients = np.append(self._quotients, quotients)
            self._residuals = np.append(self._residuals, norms / np.sqrt(squares))

    def _check_finite(self, products: Float64Array, first: int) -> None:
        if np.isfinite(products).all():
            return
        row = int(np.flatnonzero(~np.isfinite(products).all(axis=1))[0])
        report_nonfinite(self.op, jnp.asarray(products[row : row + 1]), first + row + 1)

    def _warn(self, converged: BoolArray) -> None:
        self.tolerance.warn_if_raised(self.op)
        if not converged.all():
            total = self.op.shape[0] + len(converged)
            reason = f"the products are too noisy{more_accurate(self.op)}"
            warn_unconverged(int(converged.sum()), len(converged), total, reason)


def _asymmetry(op: Operator, square: Float64Array) -> float:
    scale = np.abs(square).max()
    if scale == 0:
        return 0.0
    asymmetry = float(np.abs(square - square.T).max() / scale)
    if asymmetry > ASYMMETRY_LIMIT:
        raise ValueError(
            f"A must be symmetric: max |A - Aᵀ| is {asymmetry:.2g} of max |A|, measured by "
            f"multiplying the identity{more_accurate(op)}"
        )
    return asymmetry
