"""`softmax_ce` Hessian products in PyTorch: `torch.compile`, and a Triton kernel if there."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from benchmarks.gpu.softmax_ce import CALLS, check_values, problem
from benchmarks.gpu.timing import interleaved, torch_clock, torch_on_cuda


def _product(z: Any, u: Any, w: Any) -> Any:
    p = z.softmax(-1)
    return w * p * (u - (p * u).sum(-1, keepdim=True))


def run(smoke: bool) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Seconds of each way at (16384, 50304)."""
    torch = torch_on_cuda()
    if torch is None:
        return {"torch": "not installed, or sees no device"}, [("torch", "not on a device")]
    z, u, _, weights = problem(*((64, 1009) if smoke else (16384, 50304)))
    check_values(u)
    tz, tu = (torch.from_numpy(np.array(x)).cuda() for x in (z, u))
    w = torch.from_numpy(np.array(weights)).cuda()[:, None]
    compiled = torch.compile(_product)
    ways = {"torch.compile": torch_clock(torch, lambda: compiled(tz, tu, w), CALLS)}
    name = "hessian_eigenthings.loss_fns.fused_ce_hvp"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is not None:
        triton = importlib.import_module(name).triton_ce_hvp
        valid = torch.ones(len(tz), dtype=torch.bool, device="cuda")
        ways["Triton, hessian-eigenthings a6"] = torch_clock(
            torch, lambda: triton(tz, tu, valid, len(tz)), CALLS
        )
    seconds = interleaved(ways)
    return {"seconds": seconds}, [(k, f"{v * 1e3:.2f} ms") for k, v in seconds.items()]
