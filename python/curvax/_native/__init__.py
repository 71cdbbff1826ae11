"""The compiled kernels: availability, version check and registration with XLA.

This package alone imports the compiled modules, `_cpu` and, in a build with CUDA, `_cuda`. A build
without them (``CURVAX_NO_NATIVE=1``) is complete but slower; a module that is present and fails to
load is an error, when something first asks for it: the command line must be able to report it.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

from curvax._native import loading
from curvax.program import default_platform

__all__ = ["available", "build_info", "device_memory", "platform", "use_native", "workspace_bytes"]

CUDA_REMEDY = "reinstall curvax with --config-settings=cmake.define.CURVAX_CUDA=ON where nvcc is"
# Kernels that answer to what XLA does on a CPU, and have no counterpart elsewhere.
CPU_ONLY = frozenset({"fence", "inner_products", "matmul_sum", "residual_products"}) | {
    "put",
    "uninitialised_like",
    "zeros",
}


def platform() -> str:
    """The platform of JAX's default device: ``"cpu"``, ``"cuda"`` or another's name."""
    name = default_platform()
    return "cuda" if name == "gpu" and "cuda" in loading.present() else name


def available(kernel: str | None = None) -> bool:
    """Whether compiled kernels for the default device are installed.

    Args:
        kernel: one that has to be among them, such as ``"block_ortho"``.

    Raises:
        ImportError: they are installed but cannot be loaded.
        ValueError: ``CURVAX_ISA`` names a target that cannot be had.
    """
    loading.load_present()
    module = loading.load(platform())
    if module is None:
        return False
    return kernel is None or f"curvax.{kernel}" in loading.facts(module)["kernels"]


def use_native(kernel: str) -> bool:
    """Whether an operation that may choose should choose its compiled `kernel`.

    False where it is not installed, or when the environment variable ``CURVAX_IMPL`` is
    ``reference``. A CUDA device without compiled kernels for it gives one warning.

    Raises:
        ImportError: the kernels are installed but cannot be loaded.
        ValueError: ``CURVAX_IMPL`` is set to anything but ``reference``, ``auto`` or nothing, or
            ``CURVAX_ISA`` names a target that cannot be had.
    """
    wanted = os.environ.get("CURVAX_IMPL", "auto") or "auto"
    if wanted not in ("auto", "reference"):
        raise ValueError(f"CURVAX_IMPL must be 'auto' or 'reference', got {wanted!r}")
    if wanted == "reference":
        return False
    if platform() == "cuda" and not available():
        _warn_of_missing_cuda()
    return available(kernel)


@functools.cache
def _warn_of_missing_cuda() -> None:
    warnings.warn(
        "JAX runs on a CUDA device, for which this build of curvax has no compiled kernels: its "
        f"plain JAX forms are used, which are slower and need more memory. {CUDA_REMEDY}, or set "
        "CURVAX_IMPL=reference to keep them without this warning.",
        RuntimeWarning,
        stacklevel=3,
    )


def workspace_bytes(op: str, *sizes: object) -> int:
    """Bytes of the workspace that the CUDA kernels of `op` need; 0 where JAX has no CUDA device.

    A custom call has the same results on every platform, and a CPU takes its own scratch memory.

    Args:
        op: ``"softmax_ce"`` (dtype, rows, vocab, tangents), ``"block_ortho"`` (dtype, rows, n,
            block) or ``"rotate_basis"`` (rows).
        *sizes: those of `op`.
    """
    module = loading.load("cuda") if "cuda" in loading.present() else None
    return 0 if module is None else int(getattr(module, f"{op}_workspace")(*sizes))


def device_memory(ordinal: int) -> tuple[int, int] | None:
    """Free and total bytes of a CUDA device by the driver, whatever allocator JAX has.

    Args:
        ordinal: the device's number for CUDA.

    Returns:
        None where the module for CUDA is not there to ask, or the driver does not tell.
    """
    try:
        module = loading.load("cuda") if "cuda" in loading.present() else None
    except ImportError:
        module = None  # whoever needs its kernels is told so
    facts = {"total": 0} if module is None else module.check_device(ordinal)
    return (facts["free"], facts["total"]) if facts["total"] else None


def build_info(platform: str = "cpu") -> dict[str, Any]:
    """Facts about the compiled kernels of a platform.

    Returns:
        ``ffi_api_minor`` and ``kernels``; for ``"cpu"`` also ``compiled_targets``,
        ``supported_targets`` (of these, what this machine has), ``active_target`` and ``compiler``,
        for ``"cuda"`` also ``architectures`` and ``runtime``, the version of CUDA
        as 1000 times its major plus 10 times its minor. An empty dict where they are not installed.

    Raises:
        ImportError: they are installed but cannot be loaded.
        ValueError: ``CURVAX_ISA`` names a target that cannot be had.
    """
    module = loading.load(platform)
    return {} if module is None else loading.facts(module)
