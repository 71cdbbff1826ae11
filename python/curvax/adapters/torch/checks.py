"""What of a torch module cannot be analysed, refused with the remedy."""

import contextlib
from collections.abc import Iterator

import jax
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from curvax.adapters.torch.bridge import check_device, raised_within
from curvax.adapters.torch.state import trainable
from curvax.checks import cut
from curvax.typing import Batch


def check_module(module: nn.Module) -> None:
    """Refuse a module whose loss is not one smooth function of its parameters.

    Raises:
        TypeError: not a module, or parameters that are not float32 or float64.
        ValueError: dropout or batch normalisation in train mode, no parameter to differentiate in,
            a parameter on another device than the CPU, or one that is NaN or infinite.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        if part.training and (active := _varies(part)):
            place = f"{name!r} ({type(part).__name__})" if name else type(part).__name__
            raise ValueError(
                f"module must compute the same in every call: {place} {active}. Call "
                "module.eval() first"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        _check_dense(name, tensor)
    taken = trainable(module)
    if not taken:
        held = sorted({str(p.dtype) for p in module.parameters()})
        whole = bool(held) and not any(p.is_floating_point() for p in module.parameters())
        remedy = "Call module.float()" if whole else "Call module.requires_grad_(True)"
        raise ValueError(
            "module must have a parameter to differentiate in, got none with requires_grad"
            f"{f' (its parameters are {held})' if held else ''}: those without are constants. "
            f"{remedy}"
        )
    for name, parameter in taken.items():
        _check_parameter(name, parameter)


def check_convertible(module: nn.Module) -> None:
    """Refuse a module whose operations are out of JAX's sight.

    Raises:
        TypeError: a part was made by `torch.jit`.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            place = f"its part {name!r} is" if name else "it is"
            raise TypeError(
                f"module must be of Python, but {place} a {type(part).__name__}, which torch.jit "
                "has made: pass the module that it was made of, or let torch multiply by its own "
                "double backward: adapters.torch.double_backward(module, loss, batches)"
            )


def check_example(example: Batch) -> None:
    """Refuse a loader where one batch is wanted.

    Raises:
        TypeError: as said.
    """
    if isinstance(example, (torch.utils.data.DataLoader, torch.utils.data.Dataset, Iterator)):
        raise TypeError(
            f"example must be one batch, got {type(example).__name__}: pass next(iter(loader))"
        )


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that holds other numbers than it seems to."""
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"parameter {name!r} has no shape yet: call the module once on a batch before"
        )
    if tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        kind = f"quantized ({tensor.dtype})" if tensor.is_quantized else type(tensor).__name__
        raise TypeError(
            f"{name!r} must be a plain tensor, got {kind}: load the model in float32, or "
            "dequantize it (in transformers by model.dequantize())"
        )


def _varies(part: nn.Module) -> str:
    """Why a part in train mode does not compute a fixed function of its input; empty if it does."""
    if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
        return "is in train mode, and changes its running statistics"
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return f"is in train mode, with p = {part.p}" if part.p > 0 else ""
    # Attention and recurrent layers hold a rate in place of a layer.
    for name, value in vars(part).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            return f"is in train mode, with {name} = {value}"
    return ""


def _check_parameter(name: str, parameter: torch.Tensor) -> None:
    check_device(parameter, f"parameter {name!r}")
    if parameter.is_complex():
        raise TypeError(f"parameter {name!r} must be real, got {parameter.dtype}")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"parameter {name!r} must be float32 or float64, got {parameter.dtype}: second "
            "derivatives in fewer bits are mostly noise. Call module.float()"
        )
    if not torch.isfinite(parameter).all():
        raise ValueError(
            f"parameter {name!r} is not finite: {int((~torch.isfinite(parameter)).sum())} of "
            f"{parameter.numel()} entries are NaN or infinite. Check the checkpoint"
        )


@contextlib.contextmanager
def explained(what: str, option: str, given: object) -> Iterator[None]:
    """Say of an error of torch's own what it is about.

    Raises:
        ValueError: torch could not compute.
        TypeError: torch was given what it does not know.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        if not raised_within(error, "torch"):
            raise
        kind = TypeError if isinstance(error, (TypeError, AttributeError)) else ValueError
        shapes = jax.tree.map(lambda x: f"{x.dtype} {tuple(x.shape)}", given)
        raise kind(
            f"{what} cannot be computed of this batch, of {cut(str(shapes))}: "
            f"{type(error).__name__}: {error}. If it is to be given other parts of the batch, say "
            f"by {option} which"
        ) from error
