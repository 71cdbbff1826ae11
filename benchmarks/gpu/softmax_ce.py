"""`softmax_ce` Hessian products (N, V) against jnp under jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from benchmarks.gpu.timing import clock, interleaved

from curvax.ops.softmax_ce import softmax_ce_hvp

CALLS = 10
# Shares of the copy bandwidth at three passes.
TARGETS = {(16384, 50304): 0.85, (4096, 151936): 0.60}


def chain(impl: str) -> Any:
    """Several products in one program, each over the tangents of the one before."""

    def run(z: Any, u: Any, labels: Any, weights: Any) -> Any:
        def step(_: Any, u: Any) -> Any:
            return softmax_ce_hvp(z, u, labels, weights, impl=impl)

        return jax.lax.fori_loop(0, CALLS, step, u)

    return jax.jit(run, donate_argnums=1)


def problem(n: int, vocab: int) -> tuple[Any, Any, Any, Any]:
    """Logits, tangents, labels and weights.

    A product multiplies a tangent by about weight/V: weights of V keep the tangents' size, where
    weights of 1/N, as in a mean, would make zeros of them after some calls.
    """
    z = jax.random.normal(jax.random.key(0), (n, vocab), jnp.float32) / 4
    u = jax.random.normal(jax.random.key(1), (n, vocab), jnp.float32)
    return z, u, jnp.zeros(n, jnp.int32), jnp.full(n, vocab, jnp.float32)


def check_values(u: Any) -> None:
    """Raises if what was timed has become zeros, or is not finite."""
    share = float(jnp.mean((u != 0) & jnp.isfinite(u), dtype=jnp.float32))
    if share < 0.99:
        raise ValueError(f"only {100 * share:.1f} % of the tangents are finite and not zero")


def run(bandwidth: float, smoke: bool) -> dict[str, Any]:
    """Seconds of each way at each size, and the kernel's share of the copy bandwidth."""
    sizes = [(64, 1009)] if smoke else [(16384, 50304), (16384, 50257), (4096, 151936)]
    return {str(size): _one_size(*size, bandwidth) for size in sizes}


def _one_size(n: int, vocab: int, bandwidth: float) -> dict[str, Any]:
    z, u, labels, weights = problem(n, vocab)
    chains = {"curvax": chain("ffi"), "jnp under jit": chain("reference")}
    ways = {
        name: clock(run, lambda: (z, u.copy(), labels, weights), CALLS)
        for name, run in chains.items()
    }
    seconds = interleaved(ways)
    for run in chains.values():
        check_values(run(z, u.copy(), labels, weights))
    passes = 3 * 4 * n * vocab  # logits read, tangents read and written
    entry = {"seconds": seconds, "share_of_copy": passes / seconds["curvax"] / bandwidth}
    if (n, vocab) in TARGETS:
        entry["target_share"] = TARGETS[n, vocab]
    return entry
