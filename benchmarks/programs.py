"""Compiled programs, timed in turn."""

import random
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def compile_program(fun: Callable[..., Any], *args: Any, options: Any = None) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jax.jit(fun).lower(*args).compile(compiler_options=options)
    return lambda: jax.block_until_ready(compiled(*args)), time.perf_counter() - start


def median_seconds(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians over rounds of all programs, after one round to warm up.

    In a new order every round and after a rest, since a program pays for the one before it: memory
    that is given back, and on a shared machine processor time.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    order = random.Random(0)
    for _ in range(repeats + 1):
        for name in order.sample(list(programs), len(programs)):
            time.sleep(0.1)
            start = time.perf_counter()
            programs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def relative_difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
