"""The model of `gpt.py` in PyTorch with the same weights, solved by hessian-eigenthings."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.gpu.shape import Shape
from torch import nn


class Model(nn.Module):
    """Parameters by the names of the JAX model's leaves."""

    def __init__(self, shape: Shape, params: Any) -> None:
        super().__init__()
        self.shape = shape
        flat = {**params["blocks"], **{k: v for k, v in params.items() if k != "blocks"}}
        self.p = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(np.array(x))) for name, x in flat.items()}
        )

    def _norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], scale, None, 1e-5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        p, batch, length = self.p, *tokens.shape
        hidden = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = p["embed"][tokens] + p["position"][:length]
        for i in range(self.shape.layers):
            qkv = self._norm(x, p["norm1"][i]) @ p["qkv"][i]
            q, k, v = (
                t.view(batch, length, self.shape.heads, -1).transpose(1, 2)
                for t in qkv.chunk(3, -1)
            )
            scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, -1e30)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
            x = x + mixed @ p["out"][i]
            up = F.gelu(self._norm(x, p["norm2"][i]) @ p["up"][i], approximate="tanh")
            x = x + up @ p["down"][i]
        return self._norm(x, p["norm"]) @ p["embed"].T


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def solve(shape: Shape, params: Any, tokens: Any) -> dict[str, Any]:
    """Seconds and peak memory of its Lanczos, with as many products as it allows itself."""
    from hessian_eigenthings import HessianOperator, lanczos

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(shape, params).to(device)
    batch = torch.tensor(np.array(tokens), dtype=torch.long, device=device)
    operator = HessianOperator(model, [batch], loss)
    start = time.perf_counter()
    result = lanczos(operator, k=shape.pairs, tol=1e-3, which="LM", seed=0)
    values = [float(x) for x in result.eigenvalues]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {
        "seconds": time.perf_counter() - start,
        "eigenvalues": values,
        "peak_device_GB": peak,
    }
