"""Time and memory of a spectral density of the demo GPT's Hessian: equal runs and steps for all.

    python -m benchmarks.estimates.density [--repeats 3] [--json benchmarks/baselines/density.json]

Each density is a process of its own; the cases take turns. Time, and growth of the peak memory, run
from the weights in memory to the density on a grid, after compilation and one product. Processor
seconds are those of all threads, which other work on the machine disturbs less. The densities of
all, smoothed with one width, are compared: starts differ, so they agree to a few standard errors.
Needs the extra `bench`. 2 threads.
"""

from typing import Any

import numpy as np
from benchmarks.lib.processes import Meter, main, medians, run_case

RUNS, STEPS, POINTS = 3, 80, 10_000


def case_curvax(runs: int, seed: int) -> dict[str, Any]:
    import jax.numpy as jnp

    import curvax as cx
    from curvax.models import gpt

    params, batch = gpt.load()
    op = cx.hessian(gpt.loss, params, jnp.asarray(batch))
    cx.spectral_density(op, num_runs=1, num_steps=2, seed=seed)
    meter = Meter()
    result = cx.spectral_density(op, num_runs=runs, num_steps=STEPS, seed=seed)
    return {
        **meter.read(), "parts": result.seconds, "width": result.width,
        "nodes": np.nan_to_num(result.nodes), "weights": np.nan_to_num(result.weights),
    }  # fmt: skip


def case_hessian_eigenthings(runs: int, seed: int) -> dict[str, Any]:
    import torch
    from benchmarks.lib.torch_gpt import operator
    from hessian_eigenthings import spectral_density

    from curvax.models import gpt

    op = operator(*gpt.load())
    op.matvec(torch.ones(op.size))
    meter = Meter()
    result = spectral_density(
        op, num_runs=runs, lanczos_steps=STEPS, num_grid_points=POINTS, seed=seed
    )
    return {
        **meter.read(), "width": result.sigma,
        "nodes": result.raw_eigenvalues.numpy(), "weights": result.raw_weights.numpy(),
    }  # fmt: skip


def case_matfree(runs: int, seed: int, reortho: str) -> dict[str, Any]:
    """One compiled program per start: `vmap` over the starts would need the bases of all."""
    import jax
    from benchmarks.solves.solve import _jitted_hvp
    from matfree import decomp

    hvp, arguments, n = _jitted_hvp()
    decompose = decomp.tridiag_sym(STEPS, reortho=reortho, materialize=True)

    @jax.jit
    def quadrature(start: Any, *arguments: Any) -> Any:
        out = decompose(lambda v, *args: hvp(v, *args), start, *arguments)
        nodes, vectors = jax.numpy.linalg.eigh(out.J_small)
        return nodes, vectors[0] ** 2

    @jax.jit
    def smooth(nodes: Any, weights: Any) -> Any:
        width = (nodes.max() - nodes.min()) / STEPS
        grid = jax.numpy.linspace(nodes.min() - 8 * width, nodes.max() + 8 * width, POINTS)
        z = (grid[:, None] - nodes.reshape(1, -1)) / width
        heights = jax.numpy.exp(-0.5 * z**2) @ weights.reshape(-1)
        return grid, heights / (len(nodes) * width * jax.numpy.sqrt(2 * jax.numpy.pi)), width

    start = jax.random.normal(jax.random.key(seed), (n,))
    compiled = quadrature.lower(start, *arguments).compile()
    jax.block_until_ready(jax.jit(hvp)(start, *arguments))
    smooth(*(jax.numpy.ones((runs, STEPS)) for _ in range(2)))
    meter = Meter()
    pairs = [
        compiled(jax.random.normal(key, (n,)), *arguments)
        for key in jax.random.split(jax.random.key(seed), runs)
    ]
    nodes, weights = (jax.numpy.stack(column) for column in zip(*pairs, strict=True))
    *_, width = jax.block_until_ready(smooth(nodes, weights))
    return {**meter.read(), "width": float(width), "nodes": nodes, "weights": weights}


CASES = {
    "curvax": case_curvax,
    "hessian-eigenthings": case_hessian_eigenthings,
    "matfree, reorthogonalised": lambda runs, seed: case_matfree(runs, seed, "full"),
    "matfree, plain": lambda runs, seed: case_matfree(runs, seed, "none"),
}


def _differences(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each density from curvax's, in parts of that one's largest value.

    All are smoothed with the width of hessian-eigenthings, the largest.
    """
    width = max(run["width"] for run in found.values())
    points = np.linspace(-10 * width, 10 * width, 400)

    def density(run: dict[str, Any]) -> Any:
        nodes, weights = (np.asarray(run[name], np.float64) for name in ("nodes", "weights"))
        heights = np.exp(-0.5 * ((points[:, None, None] - nodes) / width) ** 2) * weights
        return np.nansum(heights, axis=(1, 2)) / len(nodes)

    ours = density(found["curvax"])
    return {
        case: float(np.abs(density(run) - ours).max() / ours.max())
        for case, run in found.items()
        if case != "curvax"
    }


def compare(repeats: int) -> dict[str, Any]:
    rounds = [
        {case: run_case("benchmarks.estimates.density", case, RUNS, seed) for case in CASES}
        for seed in range(repeats)
    ]
    found = medians(rounds)
    seconds, processor, growth = found.values()
    rivals = [case for case in CASES if case != "curvax"]
    return {
        "runs": RUNS,
        "steps": STEPS,
        **found,
        "widths": {case: rounds[0][case]["width"] for case in CASES},
        "largest difference from curvax's density": _differences(rounds[0]),
        "curvax's parts": rounds[0]["curvax"]["parts"],
        "ratios": {
            "fastest rival / curvax (target >= 1.2)": min(seconds[c] for c in rivals)
            / seconds["curvax"],
            "the same of processor seconds": min(processor[c] for c in rivals)
            / processor["curvax"],
            "peak growth, curvax / smallest of the rivals (target <= 1)": growth["curvax"]
            / min(growth[c] for c in rivals),
        },
        "all_seconds": {case: [found[case]["seconds"] for found in rounds] for case in CASES},
    }


if __name__ == "__main__":
    main(__doc__, CASES, compare, repeats=3)
