"""What a second operator of a loss costs, and a hundred: time to the first product, and memory.

    python -m benchmarks.products.compilation [--repeats 3] [--json FILE]

Every figure is of a process of its own. An operator is `hessian(loss, params, batch)`, timed with
its first product; the next one is at other parameters, with another batch of the same shapes, as at
the next checkpoint. Memory is the resident size, after 10 and after 100 operators in a row.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.lib.processes import main, run_case, status

import curvax as cx
from curvax.models import gpt

Problem = tuple[Callable[[Any, Any], Any], Any, Any]


def _gpt() -> Problem:
    """The shipped model, one batch of 16x64 tokens."""
    params, batch = gpt.load()
    return gpt.loss, params, jnp.asarray(batch)


def _mlp_loss(params: Any, batch: Any) -> Any:
    x, y = batch
    hidden = jax.nn.gelu(x @ params["w1"] + params["b1"])
    hidden = jax.nn.gelu(hidden @ params["w2"] + params["b2"])
    return cx.losses.softmax_cross_entropy(hidden @ params["w3"], y)


def _mlp() -> Problem:
    """Three layers of 64, 256 samples."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 64), "b1": (64,), "w2": (64, 64), "b2": (64,), "w3": (64, 10)}
    params = {
        name: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for name, shape in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(256, 32)), jnp.float32)
    return _mlp_loss, params, (x, jnp.asarray(rng.integers(0, 10, 256)))


def _checkpoints(problem: Problem, count: int) -> Iterator[Problem]:
    loss, params, batch = problem
    for i in range(count):
        yield (
            loss,
            jax.tree.map(lambda x, i=i: x * (1 + 0.01 * i), params),
            jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), batch),
        )


def _seconds(problem: Problem, vector: Any) -> float:
    """Of an operator and its first product."""
    start = time.perf_counter()
    jax.block_until_ready(cx.hessian(*problem) @ vector)
    return time.perf_counter() - start


def _twice(problem: Problem) -> dict[str, Any]:
    problems = list(_checkpoints(problem, 2))
    jax.block_until_ready(problems)
    first, second = (_seconds(each, each[1]) for each in problems)
    return {"seconds": second, "first": first, "ratio": first / second}


def _hundred(problem: Problem) -> dict[str, Any]:
    resident = {}
    for i, each in enumerate(_checkpoints(problem, 100), start=1):
        _seconds(each, each[1])
        if i in (10, 100):
            gc.collect()
            resident[i] = status("VmRSS")
    return {"MB_after_10": resident[10], "MB_after_100": resident[100]}


CASES = {
    "gpt": lambda number, seed: _twice(_gpt()),
    "mlp": lambda number, seed: _twice(_mlp()),
    "hundred": lambda number, seed: _hundred(_mlp()),
}


def compare(repeats: int) -> dict[str, Any]:
    """The ratios of the first operator's time to the second's, and of the two sizes."""
    rounds = [
        {case: run_case("benchmarks.products.compilation", case, 0, seed) for case in CASES}
        for seed in range(repeats)
    ]
    ratios = {case: float(np.median([r[case]["ratio"] for r in rounds])) for case in ("gpt", "mlp")}
    sizes = [r["hundred"] for r in rounds]
    growth = float(np.median([size["MB_after_100"] / size["MB_after_10"] for size in sizes]))
    return {
        "rounds": rounds,
        "ratios": {
            "GPT: first operator to second (target >= 8)": ratios["gpt"],
            "MLP: first operator to second (target >= 5)": ratios["mlp"],
            "memory after 100 operators to that after 10 (target <= 1.1)": growth,
        },
    }


if __name__ == "__main__":
    main(__doc__ or "", CASES, compare, repeats=3)
