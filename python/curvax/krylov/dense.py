"""The whole matrix, where it is no larger than the basis would be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.krylov import programs
from curvax.krylov.certificates import effective_tolerance, estimate_errors, warn_raised
from curvax.krylov.lanczos import ASYMMETRY_LIMIT
from curvax.krylov.programs import Clock
from curvax.krylov.settings import Settings
from curvax.operators.base import Operator
from curvax.results import EigenResult, Matvecs, Progress, warn_unconverged


def solve_dense(op: Operator, settings: Settings) -> EigenResult:
    """Multiply the identity, decompose in float64, and measure the residuals of the pairs."""
    clock, n, wanted = Clock(), op.shape[0], settings.wanted
    identity = np.eye(n, dtype=op.dtype)
    with clock.part("products"):
        columns = _products(clock, op, identity, settings.block)
    if not np.isfinite(columns).all():
        row = int(np.flatnonzero(~np.isfinite(columns).all(axis=1))[0])
        bad = [
            name or "the vector"
            for name, leaf in zip(
                op.space.names, jax.tree.leaves(op.unravel(jnp.asarray(columns[row]))), strict=True
            )
            if not np.isfinite(leaf).all()
        ]
        raise FloatingPointError(
            f"product {row + 1} of the operator is not finite; NaN or infinite entries in: "
            f"{', '.join(bad)}"
        )
    noise = _asymmetry(columns)
    with clock.part("host"):
        values, vectors = np.linalg.eigh((columns + columns.T) / 2)
        chosen = wanted.order(values)[: wanted.k]
        chosen = chosen[np.argsort(-values[chosen], kind="stable")]
        x = vectors[:, chosen].T.astype(op.dtype)
        scale = float(np.abs(values).max())
    with clock.part("verification"):
        wide = x.astype(np.float64)
        wide_products = _products(clock, op, x, settings.block)
        squares = np.sum(wide**2, axis=1)
        quotients = np.sum(wide * wide_products, axis=1) / squares
        residuals = np.linalg.norm(wide_products - quotients[:, None] * wide, axis=1)
        residuals = residuals / np.sqrt(squares)
    noise = max(noise, float(residuals.max() / scale) if scale > 0 else 0.0)
    tol = effective_tolerance(settings.tol, noise, op.dtype)
    warn_raised(settings.tol, tol, op.dtype)
    converged = residuals <= tol * scale
    others = np.delete(values, chosen)
    total = n + wanted.k
    progress = Progress(
        n, int(converged.sum()), wanted.k, float(residuals.max() / scale) if scale > 0 else 0.0,
        tol, settings.max_matvecs, 0, scale, clock.total(),
    )  # fmt: skip
    if settings.callback is not None:
        settings.callback(progress)
    if not converged.all():
        warn_unconverged(int(converged.sum()), wanted.k, total, "the products are too noisy")
    order = np.argsort(-quotients, kind="stable")
    overlap = wide[order] @ wide[order].T
    return EigenResult(
        eigenvalues=quotients[order],
        eigenvectors=op.unravel(jnp.asarray(x[order])) if settings.return_eigenvectors else None,
        residuals=residuals[order],
        bounds=residuals[order].copy(),
        estimated_errors=estimate_errors(quotients[order], residuals[order], others),
        converged=converged[order],
        complete=True,
        orthogonality=float(np.abs(overlap - np.eye(wanted.k)).max()),
        noise=noise,
        tol_effective=tol,
        num_matvecs=Matvecs(n, wanted.k),
        num_restarts=0,
        block_size=settings.block,
        seed=settings.seed,
        history=(progress,),
        seconds={**clock.seconds, "total": clock.total()},
    )


def _products(clock: Clock, op: Operator, rows: Any, block: int) -> Any:
    """The products of the rows, in float64, block by block."""
    out = np.empty(rows.shape, np.float64)
    for start in range(0, len(rows), block):
        start = max(0, min(start, len(rows) - block))
        piece = jnp.asarray(rows[start : start + block])
        out[start : start + block] = programs.run(clock, programs.multiply, op, piece)
    return out


def _asymmetry(columns: Any) -> float:
    scale = np.abs(columns).max()
    if scale == 0:
        return 0.0
    asymmetry = float(np.abs(columns - columns.T).max() / scale)
    if asymmetry > ASYMMETRY_LIMIT:
        raise ValueError(
            f"A must be symmetric: max |A - Aᵀ| is {asymmetry:.2g} of max |A|, measured by "
            "multiplying the identity"
        )
    return asymmetry
