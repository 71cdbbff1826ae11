"""Results made by hand, for tests of what is done with a result."""

import numpy as np

from curvax.results import EigenResult, Matvecs, Progress

GPT_LIKE = [30.06, 12.28, 11.28, 11.02, 9.54, 9.38, 9.15, 8.34, 8.03, 7.26]
GPT_LIKE += [-2.9, -3.1, -3.5, -4.2, -5.6]


def fake_progress(step, *, k=15, residual=None, max_matvecs=1000, seconds=None):
    return Progress(
        matvecs=step,
        converged=min(step // 4, k),
        k=k,
        residual=10.0 ** (-step / 20) if residual is None else residual,
        tol=1e-3,
        max_matvecs=max_matvecs,
        restarts=0,
        largest=30.06,
        seconds=0.2 * step if seconds is None else seconds,
    )


def fake_result(values=GPT_LIKE, residuals=None, *, tol=1e-3, **changes):
    """An `EigenResult` whose pairs are converged unless `residuals` say otherwise."""
    values = np.asarray(values, np.float64)
    scale = np.max(np.abs(values), initial=0.0)
    if residuals is None:
        residuals = scale * np.geomspace(1e-6, 5e-4, len(values))
    residuals = np.asarray(residuals, np.float64)
    fields = dict(
        eigenvalues=values,
        eigenvectors=None,
        residuals=residuals,
        bounds=residuals,
        estimated_errors=residuals**2,
        converged=residuals <= tol * scale,
        complete=None,
        orthogonality=2e-7,
        noise=3e-6,
        tol_effective=tol,
        num_matvecs=Matvecs(60, len(values)),
        num_restarts=1,
        block_size=1,
        seed=0,
        history=tuple(fake_progress(step) for step in range(1, 61)),
        seconds={
            "compile": 5.0,
            "products": 10.0,
            "orthogonalization": 0.25,
            "host": 0.125,
            "verification": 3.0,
            "total": 18.375,
        },
    )
    return EigenResult(**(fields | changes))
