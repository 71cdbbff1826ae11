"""Seconds of a call on a device, and the bandwidth that the device really has."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS = 7


def interleaved(ways: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians of what each way says that it took, over rounds of all after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            seconds[name].append(way())
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def clock(
    run: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]], calls: int = 1
) -> Callable[[], float]:
    """A way that times ``run(*prepare())``, which makes `calls` calls; both wait for the device."""

    def way() -> float:
        arguments = jax.block_until_ready(prepare())
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return (time.perf_counter() - start) / calls

    return way


def torch_on_cuda() -> Any | None:
    """PyTorch, where it is installed and sees a device."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch if torch.cuda.is_available() else None


def torch_clock(torch: Any, run: Callable[[], Any], calls: int) -> Callable[[], float]:
    """The same for a function of PyTorch, by the device's own clock."""

    def way() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return way


def copy_bandwidth(smoke: bool) -> dict[str, float]:
    """Bytes read and written per second: the best of a copy and of an elementwise function."""
    count = 1 << (22 if smoke else 29)
    x = jnp.ones(count, jnp.float32)
    ways = {
        "copy": clock(jax.jit(jnp.copy), lambda: (x,)),
        "negation": clock(jax.jit(jnp.negative), lambda: (x,)),
    }
    rates = {name: 8 * count / seconds for name, seconds in interleaved(ways).items()}
    return {**rates, "best": max(rates.values())}
