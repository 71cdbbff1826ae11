"""Finding, checking and registering the compiled module of a platform, once."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import re
from typing import Any

import jax

from curvax._native import devices
from curvax.program import present as present

# Platforms of compiled modules, by JAX's name for them when a target is registered.
PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}
# How curvax is installed without the module of a platform.
_WITHOUT = {"cpu": "with CURVAX_NO_NATIVE=1", "cuda": "without CURVAX_CUDA=ON"}


def _runtime_ffi_minor() -> int | None:
    """Reads the FFI API version of the installed jaxlib from the header that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not header.is_file():
        return None
    match = re.search(r"#define\s+XLA_FFI_API_MINOR\s+(\d+)", header.read_text())
    return int(match.group(1)) if match else None


def _check_ffi_version(platform: str, compiled: int, runtime: int | None) -> None:
    """Raises if the runtime would refuse the handlers: XLA says so only when one is called."""
    if runtime is not None and compiled > runtime:
        raise ImportError(
            f"curvax was compiled against XLA FFI API 0.{compiled}, but the installed jaxlib "
            f"implements 0.{runtime} and would refuse its kernels. Upgrade jaxlib, rebuild curvax "
            f"against this jaxlib, or reinstall it {_WITHOUT[platform]}."
        )


def installed(platform: str) -> bool:
    """Whether there is a compiled module for `platform`, loaded or not."""
    return (
        platform in PLATFORMS
        and importlib.util.find_spec(f"curvax._native._{platform}") is not None
    )


def load_present() -> None:
    """Registers the modules of every platform that JAX has devices of.

    Arrays may be committed to another device than the default one.
    """
    for platform in present():
        load(platform)


@functools.cache
def load(platform: str) -> Any | None:
    """The module of `platform`, its handlers registered; None where it is not installed.

    Raises:
        ImportError: it is installed but cannot be loaded, this jaxlib would refuse it, or a device
            that is present cannot run it.
        ValueError: ``CURVAX_ISA`` names a target that cannot be had.
    """
    if not installed(platform):
        return None
    try:
        module = importlib.import_module(f"curvax._native._{platform}")
    except ImportError as error:
        raise ImportError(
            f"curvax's compiled kernels for {platform} are installed but failed to load: {error}. "
            f"Reinstall curvax, or install it {_WITHOUT[platform]} to do without them."
        ) from error
    _check_ffi_version(platform, facts(module)["ffi_api_minor"], _runtime_ffi_minor())
    if platform == "cuda" and platform in present():
        devices.check(module)
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform=PLATFORMS[platform])
    return module


def facts(module: Any) -> dict[str, Any]:
    """What a module says about its build; a ValueError if ``CURVAX_ISA`` cannot be had."""
    build = dict(module.build_info())
    if build.get("active_target", "") is None:
        targets = build["supported_targets"]
        raise ValueError(
            f"CURVAX_ISA must be one of {', '.join(targets)}, which this build and this machine "
            f"have, got {os.environ['CURVAX_ISA']!r}; unset it to use {targets[-1]}"
        )
    return build
