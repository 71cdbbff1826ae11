"""Whether the CUDA devices at hand can run the compiled kernels, and why not."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from typing import Any

import jax

REINSTALL = "reinstall curvax where nvcc is, with --config-settings=cmake.define."
_OTHERWISE = (
    "or set CURVAX_IMPL=reference to use the plain JAX forms, or JAX_PLATFORMS=cpu to use the CPU"
)
PLUGINS = ("jax-cuda13-pjrt", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda12-plugin")


def check(module: Any) -> None:
    """Loads the kernels on every device, so that no program has to while it runs.

    Raises:
        ImportError: a device cannot run them; the message names the remedy.
    """
    warn_of_versions()
    for device in jax.local_devices(backend="cuda"):
        facts = module.check_device(device.local_hardware_id)
        if facts["error"]:
            raise ImportError(_refusal(device, facts, module.build_info()))


def _refusal(device: Any, facts: dict[str, Any], build: dict[str, Any]) -> str:
    """In words of ours, what CUDA says of a device."""
    name, error = f"{device} ({device.device_kind})", facts["error"]
    runtime, driver = version(build["runtime"]), version(facts["driver"])
    fitting = (
        f"{REINSTALL}CURVAX_CUDA=ON and --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="
        f"{facts['capability'].replace('.', '')}-real"
    )
    update = f"update the NVIDIA driver, {REINSTALL}CURVAX_CUDA=ON and an nvcc that it supports"
    if error in ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"):
        what = (
            f"were compiled for compute {architectures(build['architectures'])}, and cannot run on "
            f"{name}, which has {facts['capability']}: {fitting}"
        )
    elif error == "cudaErrorInsufficientDriver":
        what = (
            f"were compiled with CUDA {runtime}, and the driver of {name} supports none above "
            f"{driver}: {update}"
        )
    elif error == "cudaErrorUnsupportedPtxVersion":
        what = (
            f"hold no machine code for {name}, and its driver, of CUDA {driver}, is too old for "
            f"the PTX of CUDA {runtime}: {fitting}, update the NVIDIA driver"
        )
    elif error == "cudaErrorMemoryAllocation":
        what = (
            f"find no memory on {name}: {facts['free'] / 1e9:.1f} of {facts['total'] / 1e9:.1f} GB "
            "are free. End the process that holds the rest (nvidia-smi lists them), leave more to "
            "CUDA (XLA_CLIENT_MEM_FRACTION=0.9)"
        )
    else:
        what = (
            f"cannot be loaded on {name}, {error}: {facts['message']}. See that nothing else has "
            "broken the device (nvidia-smi), reinstall curvax"
        )
    return f"curvax's CUDA kernels {what}, {_OTHERWISE}"


def version(number: int) -> str:
    """CUDA's 1000 major + 10 minor as people write it."""
    major, minor = divmod(number // 10, 100)
    return f"{major}.{minor}"


def architectures(listed: str) -> str:
    """What CMake was told to compile for, in words."""
    code, ptx = [], []
    for target in listed.split():  # 80 (code and PTX), 90a-real, native
        number, _, kind = target.partition("-")
        match = re.fullmatch(r"(\d+)(\d)([a-z]?)", number)
        name = f"{match[1]}.{match[2]}{match[3]}" if match else target
        if kind != "virtual":
            code.append(name)
        if match and kind != "real":
            ptx.append(name)
    others = f"; PTX of {', '.join(ptx)} for others" if ptx else ""
    return f"capability {', '.join(code) or 'none'}{others}"


def plugins() -> dict[str, str]:
    """Versions of the packages by which JAX reaches CUDA devices."""
    found = {}
    for name in PLUGINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def warn_of_versions() -> None:
    """Warns of a plugin of another version than jaxlib.

    The handlers are checked against jaxlib's FFI, and it is the plugin that calls them.
    """
    jaxlib = importlib.metadata.version("jaxlib")
    wrong = {name: number for name, number in plugins().items() if number != jaxlib}
    if wrong:
        listed = ", ".join(f"{name} {number}" for name, number in wrong.items())
        cuda = "cuda12" if "cuda12" in listed else "cuda13"
        warnings.warn(
            f"JAX reaches CUDA by {listed}, but jaxlib is {jaxlib}: kernels may be refused or "
            f'missing. Install them together: pip install -U "jax[{cuda}]=={jaxlib}"',
            RuntimeWarning,
            stacklevel=2,
        )
