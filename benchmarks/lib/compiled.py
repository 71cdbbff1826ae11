"""Compiled programs, timed in turn."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from benchmarks.lib.interleaved import medians


def compile_program(fun: Callable[..., Any], *args: Any, options: Any = None) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jax.jit(fun).lower(*args).compile(compiler_options=options)
    return lambda: jax.block_until_ready(compiled(*args)), time.perf_counter() - start


def median_seconds(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of calls in turn; see `medians`."""
    ways = {
        name: ((lambda: None), lambda _, program=program: program())
        for name, program in programs.items()
    }
    return medians(ways, repeats)


def relative_difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
