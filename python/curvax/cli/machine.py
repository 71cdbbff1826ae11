"""What the machine is, in a line."""

from __future__ import annotations

import os
import re


def device() -> str:
    """The default device, and the version of JAX."""
    import jax

    device = jax.devices()[0]
    cores = f" ({len(os.sched_getaffinity(0))} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, JAX {jax.__version__}"


def kernels() -> str:
    """Which compiled kernels the default device uses."""
    from curvax import _native

    if not _native.available():
        return "not compiled in: plain JAX instead, slower"
    build = _native.build_info(_native.platform())
    names = [name.removeprefix("curvax.") for name in build["kernels"]]
    listed = ", ".join(names)
    if not _native.use_native(names[0]):
        return f"switched off by CURVAX_IMPL ({listed})"
    level = f", level {build['active_level']}" if "active_level" in build else " for CUDA"
    return f"compiled{level} ({listed})"


def cuda_module() -> str:
    """Whether there are kernels for CUDA devices, and for which."""
    from curvax import _native

    build = _native.build_info("cuda")
    if not build:
        return f"absent; for a CUDA device, {_native.CUDA_REMEDY}"
    major, minor = divmod(build["runtime"] // 10, 100)
    code, ptx = [], []
    for target in build["architectures"].split():  # CMake's: 80 (code and PTX), 90a-real, native
        number, _, kind = target.partition("-")
        match = re.fullmatch(r"(\d+)(\d)([a-z]?)", number)
        name = f"{match[1]}.{match[2]}{match[3]}" if match else target
        if kind != "virtual":
            code.append(name)
        if match and kind != "real":
            ptx.append(name)
    listed = ", ".join(code) or "none"
    others = f"; PTX of {', '.join(ptx)} for others" if ptx else ""
    return f"CUDA {major}.{minor}, for compute capability {listed}{others}"
