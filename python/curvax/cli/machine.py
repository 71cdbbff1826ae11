"""What the machine is, in a line."""

from __future__ import annotations

import os
from collections.abc import Iterator


def start_jax() -> None:
    """Starts JAX's platforms; a ValueError where it has none of those that it was told to use."""
    from curvax._native import loading

    loading.present()


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
    target = f", target {build['active_target']}" if "active_target" in build else " for CUDA"
    return f"compiled{target} ({listed})"


def cuda_module() -> str:
    """Whether there are kernels for CUDA devices, and for which."""
    from curvax import _native
    from curvax._native import devices

    build = _native.build_info("cuda")
    if not build:
        return f"absent; for a CUDA device, {_native.CUDA_REMEDY}"
    listed = devices.architectures(build["architectures"])
    return f"CUDA {devices.version(build['runtime'])}, for compute {listed}"


def cuda_devices() -> Iterator[tuple[str, str]]:
    """By what JAX reaches CUDA devices, and their memory."""
    import jax

    from curvax._native import devices, loading
    from curvax.memory import memory_on

    plugins = ", ".join(f"{name} {number}" for name, number in devices.plugins().items())
    if "cuda" not in loading.present():
        if plugins:
            yield "CUDA plugin", f"{plugins}; JAX finds no device that it can use: see nvidia-smi"
        return
    yield "CUDA plugin", plugins or "unknown"
    module = loading.load("cuda")
    for device in jax.local_devices(backend="cuda"):
        try:
            memory = memory_on(device)
        except RuntimeError as error:
            yield str(device), str(error)
            continue
        line = f"{memory.free / 1e9:.1f} GB free for arrays"
        if module is not None:
            facts = module.check_device(device.local_hardware_id)
            line += f"; driver for CUDA {devices.version(facts['driver'])}"
        yield str(device), "; ".join([line, *memory.remedies])
