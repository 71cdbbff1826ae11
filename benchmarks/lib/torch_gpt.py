"""The demo GPT in PyTorch, with the weights of the JAX one: what the PyTorch peers run on."""

from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from curvax.models import gpt


class TorchGPT(nn.Module):
    """Parameters in the order of `jax.tree.leaves`, so that flat vectors mean the same."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        leaves, self.treedef = jax.tree.flatten(params)
        self.leaves = nn.ParameterList([nn.Parameter(torch.tensor(np.array(x))) for x in leaves])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        p = jax.tree.unflatten(self.treedef, list(self.leaves))
        batch, length = tokens.shape
        hidden = torch.tril(torch.ones(length, length, dtype=torch.bool)).logical_not()
        x = p["embed"][tokens] + p["position"][:length]
        for block in p["blocks"]:
            y = _norm(x, block["norm1"]) @ block["attn"]["qkv"]
            q, k, v = (t.view(batch, length, gpt.HEADS, -1).transpose(1, 2) for t in y.chunk(3, -1))
            scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, -1e30)
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
            x = x + mixed @ block["attn"]["out"]
            up = F.gelu(_norm(x, block["norm2"]) @ block["mlp"]["up"], approximate="tanh")
            x = x + up @ block["mlp"]["down"]
        return _norm(x, p["norm"]) @ p["head"]


def _norm(x: torch.Tensor, p: Any) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-5)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-byte cross-entropy of `batch (B, T+1)`."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.reshape(-1, gpt.VOCAB), batch[:, 1:].reshape(-1))


def operator(params: Any, batch: Any) -> Any:
    """hessian-eigenthings' Hessian of the demo GPT on one batch, with 2 threads."""
    from hessian_eigenthings import HessianOperator

    torch.set_num_threads(2)
    tokens = torch.tensor(np.array(batch), dtype=torch.long)
    return HessianOperator(TorchGPT(params), [tokens], loss)
