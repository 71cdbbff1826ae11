"""torchax, and arrays across the border between torch and JAX.

DLPack shares memory: a change in place on the torch side would change a JAX array, which no program
expects. What crosses to JAX is therefore copied.
"""

import functools
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import torch

from curvax.adapters.frameworks import import_framework
from curvax.adapters.torch import tensor_ops
from curvax.arrays import to_array
from curvax.typing import Batch, PyTree

# Overloads with named dimensions, gone from torch 2.13, which torchax 0.0.13 still names.
_GONE = {
    "all": ("dimname", "dimname_out"),
    "index_add": ("dimname",),
    "index_copy": ("dimname",),
    "index_copy_": ("dimname",),
    "index_fill": ("Dimname_Scalar", "Dimname_Tensor"),
    "index_fill_": ("Dimname_Scalar", "Dimname_Tensor"),
    "norm": ("names_ScalarOpt_dim", "names_ScalarOpt_dim_dtype", "names_dtype_out", "names_out"),
    "prod": ("dim_Dimname",),
    "std": ("correction_names", "correction_names_out", "names_dim", "names_out"),
    "std_mean": ("correction_names", "names_dim"),
    "unbind": ("Dimname",),
}


@functools.cache
def torchax() -> ModuleType:
    """The module torchax; its import sets options of torch and JAX, so not before it is needed.

    Raises:
        ImportError: it is not installed.
    """
    for name, overloads in _GONE.items():
        packet = getattr(torch.ops.aten, name)
        for overload in overloads:
            if not hasattr(packet, overload):
                setattr(packet, overload, object())
    # torchax sets it to 1 otherwise.
    os.environ.setdefault("ENABLE_RUNTIME_UPTIME_TELEMETRY", "0")
    # torch runs attention without autograd faster by it, but torchax turns it off for everyone.
    fast = torch.backends.mha.get_fastpath_enabled()
    module = import_framework("torchax", "torch")
    torch.backends.mha.set_fastpath_enabled(fast)
    # It claims to be an accelerator, to which pinned memory, DataParallel and torch.compile turn.
    module.device_module.is_available = lambda: False
    tensor_ops.register(module)
    return module


def check_device(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor that is not on the CPU.

    Raises:
        ValueError: as said; the message begins with `name`.
    """
    if tensor.device.type != "cpu":
        remedy = "load its weights" if tensor.device.type == "meta" else "move it by .to('cpu')"
        raise ValueError(
            f"{name} must be on the CPU, from where JAX takes it to its own device, got device "
            f"{tensor.device}: {remedy}"
        )


def wide() -> bool:
    """Whether JAX's 64-bit mode is on."""
    return jnp.asarray(0.0).dtype == jnp.float64


def to_jax(tensor: torch.Tensor, name: str) -> jax.Array:
    """A copy of a tensor.

    Args:
        tensor: on the CPU.
        name: for messages.

    Raises:
        ValueError: on another device, or in 64 bits with JAX's 64-bit mode off where that loses
            something.
    """
    check_device(tensor, name)
    if tensor.dtype in (torch.float64, torch.complex128) and not wide():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}, but JAX's 64-bit mode is off: set "
            "jax.config.update('jax_enable_x64', True) first, or convert it by .float()"
        )
    dense = tensor.detach().contiguous()
    if dense.dtype == torch.int64 and not wide():
        limits = torch.iinfo(torch.int32)
        if dense.numel() and not limits.min <= dense.min() <= dense.max() <= limits.max:
            raise ValueError(f"{name} has integers beyond 32 bits, but JAX's 64-bit mode is off")
        dense = dense.to(torch.int32)
    # Now, not when a program runs that is being traced: torch may have changed it by then.
    with jax.ensure_compile_time_eval():
        if dense.dtype == torch.bool:  # not of DLPack
            return jnp.array(dense.numpy().copy())
        return jnp.array(jnp.from_dlpack(dense), copy=True)


def batch_to_jax(batch: Batch, name: str = "batch") -> PyTree:
    """A batch of tensors, in tuples, lists and mappings, as a pytree of JAX arrays.

    Args:
        batch: see above.
        name: for messages.

    Raises:
        TypeError: something else in it.
        ValueError: as `to_jax`.
    """
    if isinstance(batch, torch.Tensor):
        return to_jax(batch, name)
    if isinstance(batch, Mapping):  # the classes of tokenizers' outputs are not pytrees
        parts = {key: batch_to_jax(value, f"{name}[{key!r}]") for key, value in batch.items()}
        return OrderedDict(parts)
    if isinstance(batch, (tuple, list)):  # a DataLoader makes lists
        items = [batch_to_jax(value, f"{name}[{i}]") for i, value in enumerate(batch)]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    if not isinstance(batch, (np.ndarray, np.generic, jax.Array, bool, int, float)):
        raise TypeError(
            f"{name} must be a tensor, an array, a number, or a tuple, list or mapping of such, "
            f"got {type(batch).__name__}: leave out of the batch what the model does not compute "
            "with"
        )
    return to_array(batch, name)


def batch_to_torch(batch: Batch) -> PyTree:
    """A pytree of arrays as one of torch tensors, integers in 64 bits, as torch's losses want."""

    def one(leaf: object) -> torch.Tensor:
        tensor = torch.from_dlpack(jnp.asarray(leaf)).clone()
        whole = not tensor.dtype.is_floating_point and tensor.dtype != torch.bool
        return tensor.to(torch.int64) if whole else tensor

    return jax.tree.map(one, batch)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a NumPy array."""
    dense = tensor.detach().to_dense().cpu()
    return np.asarray(dense.float() if dense.dtype == torch.bfloat16 else dense)


def home(package: str) -> str:
    """The folder of an imported package, with a separator behind."""
    return os.path.join(os.path.dirname(sys.modules[package].__file__ or ""), "")


def raised_within(error: BaseException, *packages: str) -> bool:
    """Whether the code of one of these packages has raised an error, not what called it.

    Compiled code leaves no frame: what the modes call is torch's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [home("curvax.adapters.torch") + file for file in _CALLING_TORCH]
    return bool(frames) and frames[-1].filename.startswith((*map(home, packages), *ours))


_CALLING_TORCH = ("steps.py", "modes.py", "environment.py")
