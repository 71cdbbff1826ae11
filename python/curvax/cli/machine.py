"""What the machine is, in a line."""

from __future__ import annotations

import os


def device() -> str:
    """The default device, and the version of JAX."""
    import jax

    device = jax.devices()[0]
    cores = f" ({len(os.sched_getaffinity(0))} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, JAX {jax.__version__}"


def kernels() -> str:
    """Which compiled kernels are in use."""
    from curvax import _native

    if not _native.available():
        return "not compiled in: plain JAX instead, slower"
    build = _native.build_info()
    names = ", ".join(name.removeprefix("curvax.") for name in build["kernels"])
    if not _native.use_native():
        return f"switched off by CURVAX_IMPL ({names})"
    return f"compiled, level {build['active_level']} ({names})"
