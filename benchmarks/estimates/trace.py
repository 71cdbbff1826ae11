"""Time and memory to the trace of the demo GPT's Hessian, at equal measured errors.

    python -m benchmarks.estimates.trace [--repeats 10] [--json benchmarks/baselines/trace.json]

Each estimate is a process of its own, with a seed of its own; the cases take turns. The error is
the root mean square of the distances, over all seeds, to a reference: another estimate, of 500
products, whose standard error is stated. hessian-eigenthings makes the products that are its
default, and the others as many as reach its error. Time, and growth of the peak memory, run from
the weights in memory to the estimate, after compilation and one product. Needs the extra `bench`.
2 threads.
"""

from typing import Any

import numpy as np
from benchmarks.lib.processes import Meter, main, medians, run_case

REFERENCE_PRODUCTS = 500

# hessian-eigenthings multiplies 99 vectors by default.
PRODUCTS = {
    "curvax": 72,
    "hessian-eigenthings": 99,
    "matfree": 72,
}


def case_curvax(products: int, seed: int) -> dict[str, Any]:
    import jax.numpy as jnp

    import curvax as cx
    from curvax.models import gpt

    params, batch = gpt.load()
    op = cx.hessian(gpt.loss, params, jnp.asarray(batch))
    cx.trace(op, num_matvecs=products, seed=seed)
    meter = Meter()
    result = cx.trace(op, num_matvecs=products, seed=seed)
    return {
        **meter.read(), "estimate": result.estimate, "stderr": result.stderr,
        "method": result.method, "parts": result.seconds,
    }  # fmt: skip


def case_reference(products: int, seed: int) -> dict[str, Any]:
    import jax.numpy as jnp

    import curvax as cx
    from curvax.models import gpt

    params, batch = gpt.load()
    op = cx.hessian(gpt.loss, params, jnp.asarray(batch))
    result = cx.trace(op, num_matvecs=products, method="xtrace", seed=seed)
    return {"estimate": result.estimate, "stderr": result.stderr}


def case_hessian_eigenthings(products: int, seed: int) -> dict[str, Any]:
    """With its default, Hutch++."""
    import torch
    from benchmarks.lib.torch_gpt import operator
    from hessian_eigenthings import trace

    from curvax.models import gpt

    op = operator(*gpt.load())
    op.matvec(torch.ones(op.size))
    meter = Meter()
    result = trace(op, num_matvecs=products, seed=seed)
    return {**meter.read(), "estimate": result.estimate, "stderr": result.stderr}


def case_matfree(products: int, seed: int) -> dict[str, Any]:
    """XTrace, its best, which multiplies all vectors at once unless the product forbids it."""
    import jax
    from benchmarks.solves.solve import _jitted_hvp
    from matfree import stochtrace

    hvp, arguments, n = _jitted_hvp()

    @jax.custom_batching.sequential_vmap
    def one_by_one(v: Any, *arguments: Any) -> Any:
        return hvp(v, *arguments)

    like = jax.numpy.ones(n)
    estimate = stochtrace.estimator_leave_one_out_mean_and_sem(
        stochtrace.leave_one_out_xtrace(), stochtrace.sampler_sphere(like, num=products // 2)
    )
    run = jax.jit(lambda key, *arguments: estimate(one_by_one, key, *arguments))
    key = jax.random.key(seed)
    compiled = run.lower(key, *arguments).compile()
    jax.block_until_ready(jax.jit(hvp)(like, *arguments))
    meter = Meter()
    mean, stderr = jax.block_until_ready(compiled(key, *arguments))
    return {**meter.read(), "estimate": float(mean), "stderr": float(stderr)}


CASES = {
    "reference": case_reference,
    "curvax": case_curvax,
    "hessian-eigenthings": case_hessian_eigenthings,
    "matfree": case_matfree,
}


def compare(repeats: int) -> dict[str, Any]:
    reference = run_case("benchmarks.estimates.trace", "reference", REFERENCE_PRODUCTS, 1 << 20)
    rounds = [
        {
            case: run_case("benchmarks.estimates.trace", case, number, seed)
            for case, number in PRODUCTS.items()
        }
        for seed in range(repeats)
    ]
    errors = {
        case: float(
            np.sqrt(np.mean([(r[case]["estimate"] - reference["estimate"]) ** 2 for r in rounds]))
        )
        for case in PRODUCTS
    }
    found = medians(rounds)
    seconds, growth = found["median_seconds"], found["median_peak_growth_MB"]
    rivals = [case for case in PRODUCTS if case != "curvax"]
    return {
        "reference": {name: reference[name] for name in ("estimate", "stderr")},
        "products": PRODUCTS,
        "root_mean_square_error": errors,
        "mean_stated_error": {
            case: float(np.mean([r[case]["stderr"] for r in rounds])) for case in PRODUCTS
        },
        **found,
        "ratios": {
            "fastest rival / curvax (target >= 2)": min(seconds[c] for c in rivals)
            / seconds["curvax"],
            "error, curvax / the smallest of the rivals (target <= 1)": errors["curvax"]
            / min(errors[c] for c in rivals),
            "peak growth, curvax / smallest of the rivals (target <= 1)": growth["curvax"]
            / min(growth[c] for c in rivals),
        },
        "rounds": rounds,
    }


if __name__ == "__main__":
    main(__doc__, CASES, compare, repeats=10)
