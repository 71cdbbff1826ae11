"""Times several ways of doing one thing in turn, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

# Sizes that finish in seconds: the cases run and are checked, their ratios mean nothing.
SMOKE = os.environ.get("CURVAX_BENCH_SMOKE") == "1"
ROUNDS = 3 if SMOKE else 9


def medians(
    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Median seconds of each way, over `rounds` rounds of all after one to warm up.

    In a new order every round: a way pays for the memory that the one before it has given back.
    A way is `(prepare, run)`: ``run(prepare())`` is one call, and only ``run`` is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for _ in range(rounds + 1):
        for name in order.sample(list(ways), len(ways)):
            prepare, run = ways[name]
            # On a shared machine a long computation is paid for by the next one: the scheduler
            # owes the others its share. Every way starts rested, and, by its preparation, awake: a
            # processor that has idled runs slowly at first, memory does not.
            time.sleep(0.0 if SMOKE else 0.1)
            argument = jax.block_until_ready(prepare())
            start = time.perf_counter()
            jax.block_until_ready(run(argument))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
