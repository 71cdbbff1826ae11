"""The whole matrix, where it is no larger than the basis would be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.device import programs
from curvax.interrupt import InterruptFlag
from curvax.krylov.certificates import estimate_errors
from curvax.krylov.scaling import check_range
from curvax.krylov.settings import Settings
from curvax.krylov.tolerance import Tolerance
from curvax.operators.base import Operator
from curvax.operators.evidence import ASYMMETRY_LIMIT
from curvax.operators.precision import more_accurate
from curvax.program import Clock
from curvax.results import EigenResult, Matvecs, Progress
from curvax.typing import Float64Array
from curvax.warnings import warn_unconverged


class DenseSolve:
    """Multiplies the identity row by row, so that an interrupt keeps the rows known so far.

    With the first m rows of A known, the pairs are those of A projected onto the first m unit
    vectors; with all n, those of A.
    """

    def __init__(
        self, op: Operator, settings: Settings, interrupted: InterruptFlag, clock: Clock
    ) -> None:
        self.op = op
        self.settings = settings
        self.interrupted = interrupted
        self.clock = clock
        self.history: list[Progress] = []
        self.tolerance = Tolerance(
            settings.wanted, settings.tol, settings.relative_to, op.dtype, op.dtype
        )

    def run(self) -> EigenResult:
        """Form the matrix, decompose it in float64, and measure the residuals of the pairs."""
        wanted, n = self.settings.wanted, self.op.shape[0]
        with self.clock.part("products"):
            rows = self._products(np.eye(n, dtype=self.op.dtype), self._note)
        m = len(rows)
        # By the largest entry first: squares of float64 leave its range, too.
        largest = float(np.abs(rows).max())
        check_range(self.op, largest)
        noise = _asymmetry(self.op, rows[:, :m])
        with self.clock.part("host"):
            values, vectors = np.linalg.eigh((rows[:, :m] + rows[:, :m].T) / 2)
            chosen = wanted.order(values)[: wanted.k]
            x = np.zeros((len(chosen), n), self.op.dtype)
            x[:, :m] = vectors[:, chosen].T
            scale = float(np.abs(values).max())
            self.history[-1] = self.history[-1]._replace(largest=scale)
            # What the rows say of each residual: the part of A x outside the first m entries.
            predicted = np.linalg.norm(vectors[:, chosen].T @ rows[:, m:], axis=1)
        others = np.delete(values, chosen)
        if self.interrupted:
            residuals, values = np.full(len(x), np.nan), values[chosen]
            errors, converged = estimate_errors(values, predicted, others), np.zeros(len(x), bool)
            parts = self.tolerance.parts(values, predicted, scale)
        else:
            with self.clock.part("verification"):
                values, residuals = self._measure(x)
            noise = max(noise, float(residuals.max() / scale) if scale > 0 else 0.0)
            self.tolerance.admit(noise)
            parts = self.tolerance.parts(values, residuals, scale)
            errors = estimate_errors(values, residuals, others)
            converged = residuals <= parts * scale
            self._warn(converged)
        order = np.argsort(-values, kind="stable")
        wide = x[order].astype(np.float64)
        keep = self.settings.return_eigenvectors
        return EigenResult(
            eigenvalues=values[order],
            eigenvectors=self.op.unravel(jnp.asarray(x[order])) if keep else None,
            residuals=residuals[order],
            bounds=residuals[order].copy(),
            estimated_errors=errors[order],
            converged=converged[order],
            complete=None if self.interrupted else True,
            orthogonality=float(np.abs(wide @ wide.T - np.eye(len(x))).max()),
            noise=noise,
            tol_effective=parts[order],
            num_matvecs=Matvecs(m, 0 if self.interrupted else len(x)),
            num_restarts=0,
            block_size=self.settings.block,
            seed=self.settings.seed,
            history=tuple(self.history),
            seconds={**self.clock.seconds, "total": self.clock.total()},
            interrupted=bool(self.interrupted),
        )

    def _products(self, x: Any, note: Any = None) -> Float64Array:
        """The products of the rows of x, in float64, block by block, until an interrupt."""
        out = np.empty(x.shape, np.float64)
        block = self.settings.block
        for first in range(0, len(x), block):
            start = max(0, min(first, len(x) - block))
            # A copy: what `multiply` consumes must not share the memory of NumPy's array.
            piece = jnp.array(x[start : start + block])
            out[start : start + block] = programs.multiply(self.clock, self.op, piece)
            done = min(first + block, len(x))
            self._check_finite(out[first:done], first)
            if note is not None:
                note(done, out)
                if self.interrupted:
                    return out[:done]
        return out

    def _note(self, done: int, rows: Float64Array) -> None:
        n, k = self.op.shape[0], self.settings.wanted.k
        progress = Progress(
            matvecs=done,
            converged=k if done == n else 0,
            k=k,
            residual=0.0 if done == n else float("inf"),
            tol=self.settings.tol,
            max_matvecs=self.settings.max_matvecs,
            restarts=0,
            largest=float(np.abs(np.diagonal(rows[:done, :done])).max()),
            seconds=self.clock.total(),
        )
        self.history.append(progress)
        if self.settings.callback is not None:
            self.settings.callback(progress)

    def _measure(self, x: Any) -> tuple[Float64Array, Float64Array]:
        """Rayleigh quotients and residual norms, from fresh products."""
        wide, products = x.astype(np.float64), self._products(x)
        squares = np.sum(wide**2, axis=1)
        quotients = np.sum(wide * products, axis=1) / squares
        norms = np.linalg.norm(products - quotients[:, None] * wide, axis=1)
        return quotients, norms / np.sqrt(squares)

    def _check_finite(self, products: Float64Array, first: int) -> None:
        if np.isfinite(products).all():
            return
        row = int(np.flatnonzero(~np.isfinite(products).all(axis=1))[0])
        leaves = jax.tree.leaves(self.op.unravel(products[row]))
        bad = [
            name or "the vector"
            for name, leaf in zip(self.op.space.names, leaves, strict=True)
            if not np.isfinite(leaf).all()
        ]
        raise FloatingPointError(
            f"product {first + row + 1} of the operator is not finite; NaN or infinite entries in: "
            f"{', '.join(bad)}"
        )

    def _warn(self, converged: Any) -> None:
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
