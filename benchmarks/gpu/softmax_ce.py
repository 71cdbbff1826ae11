"""`softmax_ce` Hessian products (N, V) against jnp, `torch.compile` and a Triton kernel."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.gpu.timing import clock, interleaved, torch_clock, torch_on_cuda

from curvax.ops.softmax_ce import softmax_ce_hvp

CALLS = 10


def _chain(impl: str) -> Any:
    """Several products in one program, each over the tangents of the one before."""

    def run(z: Any, u: Any, labels: Any, weights: Any) -> Any:
        def step(_: Any, u: Any) -> Any:
            return softmax_ce_hvp(z, u, labels, weights, impl=impl)

        return jax.lax.fori_loop(0, CALLS, step, u)

    return jax.jit(run, donate_argnums=1)


def _in_torch(z: Any, u: Any, w: Any) -> Any:
    p = z.softmax(-1)
    return w * p * (u - (p * u).sum(-1, keepdim=True))


def _torch_ways(z: Any, u: Any) -> dict[str, Any]:
    torch = torch_on_cuda()
    if torch is None:
        return {}
    tz, tu = (torch.from_numpy(np.asarray(x)).cuda() for x in (z, u))
    w = torch.full((len(tz), 1), 1 / len(tz), device="cuda")
    compiled = torch.compile(_in_torch)
    ways = {"torch.compile": torch_clock(torch, lambda: compiled(tz, tu, w), CALLS)}
    name = "hessian_eigenthings.loss_fns.fused_ce_hvp"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is not None:
        kernel = importlib.import_module(name).triton_ce_hvp
        valid = torch.ones(len(tz), dtype=torch.bool, device="cuda")
        ways["Triton, hessian-eigenthings a6"] = torch_clock(
            torch, lambda: kernel(tz, tu, valid, len(tz)), CALLS
        )
    return ways


def run(bandwidth: float, smoke: bool) -> dict[str, Any]:
    """Seconds of each way at each size, and the kernel's share of the copy bandwidth."""
    sizes = [(64, 1009)] if smoke else [(16384, 50304), (16384, 50257), (4096, 151936)]
    return {str(size): _one_size(*size, bandwidth, smoke) for size in sizes}


def _one_size(n: int, vocab: int, bandwidth: float, smoke: bool) -> dict[str, Any]:
    z = jax.random.normal(jax.random.key(0), (n, vocab), jnp.float32)
    u = jax.random.normal(jax.random.key(1), (n, vocab), jnp.float32)
    labels, weights = jnp.zeros(n, jnp.int32), jnp.full(n, 1 / n, jnp.float32)
    ways = {
        name: clock(_chain(impl), lambda: (z, u.copy(), labels, weights), CALLS)
        for name, impl in (("curvax", "ffi"), ("jnp under jit", "reference"))
    }
    if not smoke:
        ways |= _torch_ways(z, u)
    seconds = interleaved(ways)
    passes = 3 * 4 * n * vocab  # logits read, tangents read and written
    return {
        "seconds": seconds,
        "share_of_copy_at_three_passes": passes / seconds["curvax"] / bandwidth,
    }
