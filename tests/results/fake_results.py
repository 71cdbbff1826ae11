"""Results made by hand, for tests of what is done with a result."""

import jax
import jax.numpy as jnp
import numpy as np

from curvax.results import (
    BlockResults,
    DiagonalResult,
    EigenResult,
    LanczosTridiagonal,
    Progress,
    SolveResult,
    SpectralDensity,
    TraceProgress,
    TraceResult,
)
from curvax.results.smoothing import smoothed_density

NAN, INF = float("nan"), float("inf")
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
        estimated_errors=residuals**2,
        converged=residuals <= tol * scale,
        complete=None,
        orthogonality=2e-7,
        noise=3e-6,
        tol_effective=np.full(len(values), tol),
        num_matvecs=60,
        num_verification=len(values),
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


def fake_trace(estimate=10.0, stderr=0.5, *, steps=20, until=None, **changes):
    """A `TraceResult` whose standard error fell with the root of the products."""
    rng = np.random.default_rng(0)
    history = tuple(
        TraceProgress(
            matvecs=step,
            estimate=estimate + stderr * (steps / step - 1) ** 0.5,
            stderr=stderr * (steps / step) ** 0.5 if step > 1 else np.inf,
            max_matvecs=steps,
            until=until,
            seconds=0.1 * step,
        )
        for step in range(1, steps + 1)
    )
    fields = dict(
        estimate=estimate,
        stderr=stderr,
        interval=(estimate - 2.09 * stderr, estimate + 2.09 * stderr),
        samples=rng.normal(estimate, stderr, steps),
        method="hutchinson",
        distribution="rademacher",
        num_matvecs=steps,
        num_deflated=0,
        block_size=1,
        seed=0,
        history=history,
        seconds={"compile": 1.0, "products": 2.0, "host": 0.5, "total": 3.5},
    )
    return TraceResult(**(fields | changes))


def fake_diagonal(estimate, stderr=None, **changes):
    """A `DiagonalResult` of `estimate`, a pytree; exact if there is no `stderr`."""
    exact = stderr is None
    fields = dict(
        estimate=estimate,
        stderr=jax.tree.map(np.zeros_like, estimate) if exact else stderr,
        num_samples=1 if exact else 20,
        method="exact" if exact else "hutchinson",
        num_matvecs=20,
        block_size=1,
        seed=None if exact else 0,
        seconds={"total": 1.0},
    )
    return DiagonalResult(**(fields | changes))


def fake_density(nodes, weights, atoms=(), *, n=1000, width=0.1, outliers=None, **changes):
    """A `SpectralDensity` of given runs, on a grid that resolves them; nodes are eigenvalues."""
    nodes, weights = np.asarray(nodes, np.float64), np.asarray(weights, np.float64)
    atoms = np.asarray(atoms, np.float64)
    places = np.append(nodes[~np.isnan(nodes)], atoms)
    around = (places[:, None] + width * np.linspace(-8, 8, 161)).ravel()
    far = np.linspace(places.min() - 8 * width, places.max() + 8 * width, 101)
    grid = np.unique(np.append(around, far))
    density, lower, upper = smoothed_density(grid, nodes, weights, atoms, n, width)
    fields = dict(
        grid=grid,
        density=density,
        lower=lower,
        upper=upper,
        width=width,
        nodes=nodes,
        weights=weights,
        atoms=atoms,
        outliers=np.sort(atoms)[::-1] if outliers is None else np.asarray(outliers, np.float64),
        num_parameters=n,
        num_steps=nodes.shape[1],
        num_deflated=len(atoms),
        num_matvecs=nodes.size,
        block_size=len(nodes),
        seed=0,
        seconds={"total": 1.0},
        residuals=np.zeros_like(nodes),
    )
    return SpectralDensity(**(fields | changes))


def fake_lanczos(m=30, *, last_beta=0.1, basis=None):
    """A `LanczosTridiagonal` with random coefficients."""
    rng = np.random.default_rng(m)
    betas = rng.uniform(0.5, 1.0, m - 1)
    seconds = {"recurrence": 1.0, "total": 1.5}
    return LanczosTridiagonal(rng.normal(size=m), betas, last_beta, basis, m, None, seconds)


def fake_solution(x=(1.0, 2.0), **changes):
    """A `SolveResult` that conjugate gradients reached."""
    fields = dict(
        x=np.float32(x),
        relative_residual=1.234e-6,
        converged=True,
        tol=1e-5,
        damping=0.0,
        method="cg",
        num_matvecs=11,
        num_verification=1,
        seconds={"products": 1.0, "total": 1.5},
    )
    return SolveResult(**(fields | changes))


def fake_blocks(names, make, size=100):
    """`BlockResults` of `make(i)` for the i-th name."""
    results = {name: make(i) for i, name in enumerate(names)}
    return BlockResults(results, dict.fromkeys(results, size))


def odd_results():
    """A result of every class, with the values that files find hard."""
    vectors = {
        "w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "b": [np.float16([[NAN], [-0.0]]), None, (np.zeros((2, 0), np.float32),)],
    }
    return {
        "eigen": fake_result([1e300, -1e-300], residuals=[NAN, INF], eigenvectors=vectors),
        "plain": fake_result([], complete=True, seed=2**64 - 1, noise=-INF),
        "trace": fake_trace(NAN, INF, interval=(-INF, INF), until=0.1, interrupted=True),
        "diagonal": fake_diagonal({"a": np.float32([NAN, 1]), "b": {"c": jnp.ones(())}}),
        "density": fake_density([[0.0, 1.0], [0.5, NAN]], [[0.5, 0.5], [1.0, NAN]], [3.0]),
        "lanczos": fake_lanczos(5, basis=jnp.ones((5, 7))),
        "start": fake_lanczos(1, last_beta=np.float64(0.0)),
        "solution": fake_solution([NAN, -0.0], damping=INF, interrupted=True),
        "eigen blocks": fake_blocks(["a/b", "..\\c", "ü.0"], lambda i: fake_result([i + 1.0])),
        "trace blocks": fake_blocks("abc", lambda i: fake_trace(i)),
        "diagonal blocks": fake_blocks("ab", lambda i: fake_diagonal(np.arange(3.0) + i)),
        "no blocks": fake_blocks([], None),
    }
