"""A product in a solve, which uses memory again, beside others; and allocations after a solve.

    python -m benchmarks.products.heap [--repeats 5] [--json FILE]

Of the shipped GPT: one linearised product by itself, one while memory is kept, and one of ten in a
loop of one program, timed in turn, with the pages that each faults in. Allocations are of NumPy, in
a process that freed blocks of all these sizes before, before and after a solve; each block is
written to, as its owner would.
"""

import functools
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.lib.processes import main, run_case, status

import curvax as cx
from curvax.models import gpt
from curvax.operators.checked_product import compiled_product

ROUNDS = 9
SIZES = [1 << 16, 1 << 20, 1 << 23, 20 << 20, 40 << 20]


def _measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and page faults."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def _products() -> dict[str, Any]:
    params, batch = gpt.load()
    op = cx.hessian(gpt.loss, params, jnp.asarray(batch))
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.standard_normal((1, op.shape[0])), jnp.float32)
    product = functools.partial(compiled_product, op, v)
    again = functools.partial(jax.lax.fori_loop, 0, 10, lambda _, u: op.product(u) * 1e-2)
    ten = jax.jit(again).lower(v).compile()
    solve = functools.partial(cx.eigsh, op, 3, tol=1e-2, seed=0, return_eigenvectors=False)
    with cx.keep_memory(False):
        solve()
    kept, plain, loop = [], [], []
    for _ in range(ROUNDS):
        plain.append(_measured(product))
        with cx.keep_memory():
            for _ in range(2):
                product().block_until_ready()
            kept.append(_measured(product))
            ten(v)[0].block_until_ready()
            loop.append(_measured(lambda: ten(v)))
    resident = status("VmRSS")
    solve()
    found = {"MB_before_a_solve": resident, "MB_after_it": status("VmRSS")}
    for name, runs, count in (("plain", plain, 1), ("kept", kept, 1), ("loop", loop, 10)):
        found[f"ms_{name}"], faults = np.median(runs, axis=0) / count * [1e3, 1]
        found[f"faults_{name}"] = float(faults)
    return found


def _allocations() -> dict[str, Any]:
    def seconds(size: int) -> float:
        start = time.perf_counter()
        for _ in range(20):
            np.empty(size, np.uint8)[::4096] = 1
        return (time.perf_counter() - start) / 20

    for size in SIZES:
        seconds(size)
    before = [[seconds(size) for size in SIZES] for _ in range(ROUNDS)]
    cx.eigsh(np.diag(np.arange(1.0, 31)).astype(np.float32), 2)
    after = [[seconds(size) for size in SIZES] for _ in range(ROUNDS)]
    pairs = zip(SIZES, np.median(before, axis=0), np.median(after, axis=0), strict=True)
    return {f"{size >> 10}_KiB": [float(a * 1e6), float(b * 1e6)] for size, a, b in pairs}


CASES = {
    "products": lambda number, seed: _products(),
    "allocations": lambda number, seed: _allocations(),
}


def compare(repeats: int) -> dict[str, Any]:
    """Ratios of times and of faults, medians over the processes."""
    rounds = [
        {case: run_case("benchmarks.products.heap", case, 0, seed) for case in CASES}
        for seed in range(repeats)
    ]
    products = [r["products"] for r in rounds]

    def ratio(a: str, b: str) -> float:
        return float(np.median([found[a] / found[b] for found in products]))

    slower = {
        size: float(
            np.median([r["allocations"][size][1] / r["allocations"][size][0] for r in rounds])
        )
        for size in rounds[0]["allocations"]
    }
    return {
        "rounds": rounds,
        "ratios": {
            "kept / in a loop of one program (target <= 1.05)": ratio("ms_kept", "ms_loop"),
            "kept / by itself": ratio("ms_kept", "ms_plain"),
            "page faults, kept / by itself (target <= 0.05)": ratio("faults_kept", "faults_plain"),
            "memory after a solve / before": ratio("MB_after_it", "MB_before_a_solve"),
            **{f"allocation of {size}, after / before": x for size, x in slower.items()},
        },
    }


if __name__ == "__main__":
    main(__doc__ or "", CASES, compare, repeats=5)
