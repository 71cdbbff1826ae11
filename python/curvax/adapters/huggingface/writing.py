"""How a model of transformers writes what can be written in several ways.

The one place that decides so of attention and of experts. The source runs as the user has it, our
side what JAX can run and differentiate twice.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from curvax.adapters.frameworks import import_framework
from curvax.adapters.torch.bridge import torchax

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ATTENTION = ("eager", "sdpa")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")


@contextlib.contextmanager
def written(model: nn.Module, *, ours: bool = False) -> Iterator[None]:
    """Set the options of a model's configurations, and leave all of them as they were.

    Args:
        model: of transformers.
        ours: whether for the program that JAX runs, or what is compared with that step by step;
            else for the source.
    """
    configs = _configs(model)
    kept = [(config, dict(vars(config))) for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = _attention(model, config)
            config._experts_implementation_internal = _experts(model, config, ours)
            for name, value in (("use_cache", False), ("return_dict", True)):
                if hasattr(config, name):
                    setattr(config, name, value)
        with _without_short_cuts() if ours else contextlib.nullcontext():
            yield
    finally:
        for config, before in kept:
            vars(config).clear()
            vars(config).update(before)


def _configs(model: nn.Module) -> list["PretrainedConfig"]:
    """Of the model, its parts and theirs."""
    found: dict[int, PretrainedConfig] = {}

    def visit(config: "PretrainedConfig") -> None:
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            for name in config.sub_configs:
                visit(getattr(config, name, None))

    for part in model.modules():
        visit(getattr(part, "config", None))
    return list(found.values())


def _attention(model: nn.Module, config: "PretrainedConfig") -> str | None:
    """The user's, where torch has second derivatives of it on a CPU."""
    chosen: str | None = config._attn_implementation_internal
    if chosen is None or chosen in _ATTENTION:
        return chosen
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _experts(model: nn.Module, config: "PretrainedConfig", ours: bool) -> str | None:
    """For ours a product over groups, since the loop over experts depends on the routes.

    torch has that product in at most 32 bits.
    """
    chosen: str | None = config._experts_implementation_internal
    if chosen is not None and chosen not in _EXPERTS:
        return chosen
    parameters = list(model.parameters())
    traced = any(isinstance(p, torchax().tensor.Tensor) for p in parameters)
    wide = not traced and any(p.dtype == torch.float64 for p in parameters)
    if ours:
        return "batched_mm" if wide else "grouped_mm"
    return "eager" if wide and chosen == "grouped_mm" else chosen


@contextlib.contextmanager
def _without_short_cuts() -> Iterator[None]:
    """Build masks whatever their values: of one that masks nothing transformers builds none.

    One program then serves all batches. It is what transformers does where it believes itself
    traced.
    """
    utils = import_framework("transformers", "huggingface").utils.import_utils
    kept = utils.is_jit_tracing
    try:
        utils.is_jit_tracing = lambda: True
        yield
    finally:
        utils.is_jit_tracing = kept
