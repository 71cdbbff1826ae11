"""What a module holds, and how it is left as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def holders(module: nn.Module) -> list[dict[str, torch.Tensor | None]]:
    """The dicts in which the parts of a module hold their tensors and hooks.

    A module may install hooks as it is called, and note on itself that it has.
    """
    found: list[dict[str, torch.Tensor | None]] = []
    for part in module.modules():
        hooks = [x for name, x in vars(part).items() if "_hooks" in name and isinstance(x, dict)]
        found += [part._parameters, part._buffers, vars(part), *hooks]
    return found


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a shared one under its first."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Leave a module that is called as it was, and torch's random numbers too.

    Parameters are not copied: a call does not change them.
    """
    kept = [(holder, dict(holder)) for holder in holders(module)]
    tensors = [
        (tensor, tensor._version, tensor.detach().clone())
        for holder, _ in kept
        for tensor in holder.values()
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter)
    ]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for holder, before in kept:
            holder.clear()
            holder.update(before)
        with torch.no_grad():
            for tensor, version, value in tensors:
                if tensor._version != version:
                    tensor.copy_(value)
