"""The compiled kernels: availability, version check and registration with XLA.

This is the only module that imports the compiled extension. A build without it
(``CURVAX_NO_NATIVE=1``) is complete but slower; an extension that is present and fails to load is
an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import re
from typing import Any

import jax

__all__ = ["available", "build_info", "use_native"]


def _runtime_ffi_minor() -> int | None:
    """Reads the FFI API version of the installed jaxlib from the header that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return None
    match = re.search(r"#define\s+XLA_FFI_API_MINOR\s+(\d+)", header.read_text())
    return int(match.group(1)) if match else None


def _check_ffi_version(compiled: int, runtime: int | None) -> None:
    """Raises if the runtime would refuse the handlers: XLA says so only when one is called."""
    if runtime is not None and compiled > runtime:
        raise ImportError(
            f"curvax was compiled against XLA FFI API 0.{compiled}, but the installed jaxlib "
            f"implements 0.{runtime} and would refuse its kernels. Upgrade jaxlib, rebuild curvax "
            "against this jaxlib, or reinstall with CURVAX_NO_NATIVE=1."
        )


def _load() -> Any | None:
    if importlib.util.find_spec("curvax._native._cpu") is None:
        return None
    try:
        module = importlib.import_module("curvax._native._cpu")
    except ImportError as error:
        raise ImportError(
            f"curvax's compiled kernels are installed but failed to load: {error}. Reinstall "
            "curvax, or install it with CURVAX_NO_NATIVE=1 to do without them."
        ) from error
    try:
        info = module.build_info()
    except ValueError as error:
        raise ImportError(f"curvax: {error}; it is {os.environ.get('CURVAX_ISA')!r}") from None
    _check_ffi_version(info["ffi_api_minor"], _runtime_ffi_minor())
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return module


_module = _load()


def available() -> bool:
    """Whether the compiled kernels are installed."""
    return _module is not None


def use_native() -> bool:
    """Whether an operation that may choose should choose its compiled kernel.

    False where the kernels are not installed, or when the environment variable ``CURVAX_IMPL`` is
    ``reference``.

    Raises:
        ValueError: ``CURVAX_IMPL`` is set to anything but ``reference``, ``auto`` or nothing.
    """
    wanted = os.environ.get("CURVAX_IMPL", "auto") or "auto"
    if wanted not in ("auto", "reference"):
        raise ValueError(f"CURVAX_IMPL must be 'auto' or 'reference', got {wanted!r}")
    return available() and wanted == "auto"


def build_info() -> dict[str, Any]:
    """Facts about the compiled kernels.

    Returns:
        ``ffi_api_minor``, ``compiled_levels``, ``active_level``, ``kernels`` and ``compiler``; an
        empty dict where they are not installed.
    """
    return dict(_module.build_info()) if _module is not None else {}
