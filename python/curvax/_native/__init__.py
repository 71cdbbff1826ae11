"""The compiled kernels: availability, version check and registration with XLA.

This is the only module that imports the compiled extension. A build without it
(``CURVAX_NO_NATIVE=1``) is complete but slower; an extension that is present and fails to load is
an error, when something first asks for it: the command line must be able to report it.
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
    _check_ffi_version(_facts(module)["ffi_api_minor"], _runtime_ffi_minor())
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return module


def _facts(module: Any) -> dict[str, Any]:
    try:
        return dict(module.build_info())
    except ValueError:
        asked = os.environ["CURVAX_ISA"]
    del os.environ["CURVAX_ISA"]
    try:
        best = module.build_info()
    finally:
        os.environ["CURVAX_ISA"] = asked
    # The levels rise, so a machine has every one up to its best.
    levels = best["compiled_levels"][: best["compiled_levels"].index(best["active_level"]) + 1]
    raise ValueError(
        f"CURVAX_ISA must be one of {', '.join(levels)}, which this build and this machine have, "
        f"got {asked!r}; unset it to use {levels[-1]}"
    )


_NOT_LOADED = object()
_module: Any = _NOT_LOADED


def _loaded() -> Any | None:
    global _module
    if _module is _NOT_LOADED:
        _module = _load()
    return _module


def available() -> bool:
    """Whether the compiled kernels are installed.

    Raises:
        ImportError: they are installed but cannot be loaded.
        ValueError: ``CURVAX_ISA`` names a level that cannot be had.
    """
    return _loaded() is not None


def use_native() -> bool:
    """Whether an operation that may choose should choose its compiled kernel.

    False where the kernels are not installed, or when the environment variable ``CURVAX_IMPL`` is
    ``reference``.

    Raises:
        ImportError: the kernels are installed but cannot be loaded.
        ValueError: ``CURVAX_IMPL`` is set to anything but ``reference``, ``auto`` or nothing, or
            ``CURVAX_ISA`` names a level that cannot be had.
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

    Raises:
        ImportError: they are installed but cannot be loaded.
        ValueError: ``CURVAX_ISA`` names a level that cannot be had.
    """
    return _facts(_module) if available() else {}
