"""Modules and batches that several tests of the adapter for PyTorch use."""

import torch
from torch import nn


class Applied(nn.Module):
    """A linear layer, a function, and another linear layer."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def state_of(module):
    """All that a user can see of a module."""
    return {
        "parameters": {n: (id(p), p.requires_grad, p.grad) for n, p in module.named_parameters()},
        "values": {n: t.detach().clone() for n, t in module.state_dict().items()},
        "training": [part.training for part in module.modules()],
        "attributes": [sorted(vars(part)) for part in module.modules()],
        "random": torch.random.get_rng_state(),
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def batch_for(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)


def mlp():
    return nn.Sequential(
        nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def classes(samples=10):
    return torch.randint(0, 3, (samples,))
