"""`curvax info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable

from jax import Array

from curvax.cli.app import Command, app
from curvax.cli.display import open_stdout, print_facts
from curvax.cli.exits import failures
from curvax.cli.machine import cuda_devices, cuda_module, kernels, start_jax


@app.command(cls=Command)
def info() -> None:
    """Show versions, devices and the compiled kernels."""
    with failures():
        print_facts(open_stdout(), dict(_info()))


def _info() -> Iterable[tuple[str, str]]:
    import jax

    from curvax import _native
    from curvax.heap import kept_or_not
    from curvax.ops.fence import fence

    start_jax()
    build = _native.build_info()
    yield "curvax", importlib.metadata.version("curvax")
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "jax", f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}"
    yield "devices", ", ".join(str(device) for device in jax.devices())
    yield "kernels", kernels()
    if build:
        yield "FFI API", f"0.{build['ffi_api_minor']}"
        yield "targets", f"{', '.join(build['compiled_targets'])}; in use: {build['active_target']}"
        # GCC gives its number alone, other compilers their name too.
        name = "GCC " if build["compiler"][0].isdigit() else ""
        yield "compiler", name + build["compiler"]

    yield "CUDA module", cuda_module()
    yield from cuda_devices()

    def probe(x: Array) -> Array:
        return x

    yield "fence", "active" if fence(probe) is not probe else "not active"
    yield "memory of products", kept_or_not()
    for variable in ("CURVAX_IMPL", "CURVAX_ISA"):
        if os.environ.get(variable):
            yield variable, os.environ[variable]
