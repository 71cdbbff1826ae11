"""How a model of transformers writes what can be written in several ways.

The one place that decides so of attention and of experts. The source runs as the user has it, our
side what JAX can run and differentiate twice.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from curvax.adapters.torch.bridge import torchax

_ATTENTION = ("eager", "sdpa")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")


@contextlib.contextmanager
def written(model: nn.Module) -> Iterator[None]:
    """Set the options of a model's configurations, and leave all of them as they were."""
    configs = _configs(model)
    kept = [(config, dict(vars(config))) for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = _attention(model, config)
            config._experts_implementation_internal = _experts(model, config)
            for name, value in (("use_cache", False), ("return_dict", True)):
                if hasattr(config, name):
                    setattr(config, name, value)
        yield
    finally:
        for config, before in kept:
            vars(config).clear()
            vars(config).update(before)


def _configs(model: nn.Module) -> list[Any]:
    """Of the model, its parts and theirs."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            for name in config.sub_configs:
                visit(getattr(config, name, None))

    for part in model.modules():
        visit(getattr(part, "config", None))
    return list(found.values())


def _attention(model: nn.Module, config: Any) -> str | None:
    """The user's, where torch has second derivatives of it on a CPU."""
    chosen: str | None = config._attn_implementation_internal
    if chosen is None or chosen in _ATTENTION:
        return chosen
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _experts(model: nn.Module, config: Any) -> str | None:
    """A product over groups on JAX, where the loop over experts depends on the routes.

    torch has that product in at most 32 bits.
    """
    chosen: str | None = config._experts_implementation_internal
    if chosen is not None and chosen not in _EXPERTS:
        return chosen
    parameters = list(model.parameters())
    if any(isinstance(p, torchax().tensor.Tensor) for p in parameters):
        return "grouped_mm"
    wide = any(p.dtype == torch.float64 for p in parameters)
    return "eager" if wide and chosen == "grouped_mm" else chosen
