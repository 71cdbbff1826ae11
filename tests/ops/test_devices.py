"""CUDA devices that cannot run the kernels: what JAX and CUDA would say of them is made up."""

from __future__ import annotations

import importlib.metadata
import re
import types

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import curvax as cx
from curvax import cli
from curvax import program as program_module
from curvax._native import devices, loading
from curvax.models import gpt

GB = 10**9
FITTING = {
    "driver": 13000,
    "capability": "9.0",
    "free": 90 * GB,
    "total": 140 * GB,
    "error": "",
    "message": "",
}


def module(**changes):
    """As the compiled module, where its device says so."""
    build = {"ffi_api_minor": 3, "architectures": "80-real 120-real", "runtime": 13000}
    return types.SimpleNamespace(
        build_info=lambda: {**build, "kernels": []},
        check_device=lambda ordinal: {**FITTING, **changes, "ordinal": ordinal},
        registrations=dict,
    )


class Device:
    device_kind = "NVIDIA H200"
    local_hardware_id = 1
    platform = "gpu"

    def __str__(self):
        return "cuda:1"

    def memory_stats(self):
        return {"bytes_limit": 100 * GB, "bytes_in_use": 10 * GB, "pool_bytes": 20 * GB}


@pytest.fixture
def on_a_device(monkeypatch):
    """As where JAX has a CUDA device; the argument is curvax's module for it."""

    def set_up(compiled):
        own = jax.local_devices
        monkeypatch.setattr(loading, "present", lambda: frozenset({"cpu", "cuda"}))
        monkeypatch.setattr(
            jax, "local_devices", lambda backend: [Device()] if backend == "cuda" else own()
        )
        cpu = loading.load("cpu")
        load = loading.load.__wrapped__
        monkeypatch.setattr(loading, "installed", lambda platform: True)
        imports = types.SimpleNamespace(import_module=lambda name: compiled)
        monkeypatch.setattr(loading, "importlib", imports)
        monkeypatch.setattr(loading, "load", lambda p: compiled if p == "cuda" else cpu)
        return load

    return set_up


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (
            {"error": "cudaErrorNoKernelImageForDevice"},
            "compute capability 8.0, 12.0, and cannot run on cuda:1 (NVIDIA H200), which has 9.0: "
            "reinstall curvax where nvcc is, with --config-settings=cmake.define.CURVAX_CUDA=ON "
            "and --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real",
        ),
        (
            {"error": "cudaErrorInsufficientDriver", "driver": 12040},
            "with CUDA 13.0, and the driver of cuda:1 (NVIDIA H200) supports none above 12.4: "
            "update the NVIDIA driver",
        ),
        (
            {"error": "cudaErrorUnsupportedPtxVersion", "driver": 12080, "capability": "10.3"},
            "its driver, of CUDA 12.8, is too old for the PTX of CUDA 13.0: "
            "reinstall curvax where nvcc is, with --config-settings=cmake.define.CURVAX_CUDA=ON "
            "and --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=103-real, update",
        ),
        (
            {"error": "cudaErrorMemoryAllocation", "free": GB // 5},
            "find no memory on cuda:1 (NVIDIA H200): 0.2 of 140.0 GB are free. End the process",
        ),
        (
            {"error": "cudaErrorECCUncorrectable", "message": "uncorrectable ECC error"},
            "cannot be loaded on cuda:1 (NVIDIA H200), cudaErrorECCUncorrectable: uncorrectable",
        ),
    ],
)
def test_a_device_that_cannot_run_the_kernels(on_a_device, facts, told):
    load = on_a_device(module(**facts))
    with pytest.raises(ImportError, match=re.escape(told)) as caught:
        load("cuda")
    assert "CURVAX_IMPL=reference" in str(caught.value) and "JAX_PLATFORMS=cpu" in str(caught.value)


def test_kernels_are_loaded_on_every_device_and_by_its_number(on_a_device, monkeypatch):
    asked = []
    compiled = module()
    check = compiled.check_device
    compiled.check_device = lambda ordinal: (asked.append(ordinal), check(ordinal))[1]
    load = on_a_device(compiled)
    assert load("cuda") is compiled and asked == [1]
    # Without a device there is nothing to check, and the module still tells of its build.
    monkeypatch.setattr(loading, "present", lambda: frozenset({"cpu"}))
    assert load("cuda") is compiled and asked == [1]


def test_a_plugin_of_another_version_than_jaxlib(on_a_device, monkeypatch):
    version = importlib.metadata.version
    others = {"jax-cuda13-pjrt": "0.9.9", "jax-cuda13-plugin": version("jaxlib")}

    def of(name):
        if name.startswith("jax-cuda12"):
            raise importlib.metadata.PackageNotFoundError(name)
        return others.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", of)
    load = on_a_device(module())
    remedy = re.escape(f'pip install -U "jax[cuda13]=={version("jaxlib")}"')
    with pytest.warns(RuntimeWarning, match=f"by jax-cuda13-pjrt 0.9.9, but.*{remedy}"):
        load("cuda")
    others["jax-cuda13-pjrt"] = version("jaxlib")
    load("cuda")  # a warning is an error here


def info(**environment):
    return CliRunner().invoke(cli.app, ["info"], env=environment)


@pytest.mark.parametrize(
    ("free", "others"),
    # Of the 50 GB that are not free, 20 are JAX's.
    [(90, "; end the other process that holds 30.0 GB of the device"), (120, "")],
)
def test_info_tells_of_the_device_and_who_holds_its_memory(free, others, on_a_device, monkeypatch):
    on_a_device(module(free=free * GB))
    monkeypatch.setattr(devices, "plugins", lambda: {"jax-cuda13-pjrt": "0.11.2"})
    text = info().stdout
    assert re.search("CUDA module +CUDA 13.0, for compute capability 8.0, 12.0\n", text)
    assert re.search("CUDA plugin +jax-cuda13-pjrt 0.11.2\n", text)
    assert re.search(f"cuda:1 +90.0 GB free for arrays; driver for CUDA 13.0{others}", text)
    assert bool(others) == ("end the other process" in text)


def test_info_where_there_is_a_plugin_and_no_device(monkeypatch):
    monkeypatch.setattr(devices, "plugins", lambda: {"jax-cuda13-pjrt": "0.11.2"})
    assert re.search("CUDA plugin +jax-cuda13-pjrt 0.11.2; JAX finds no device", info().stdout)


@pytest.fixture(params=[AssertionError(), RuntimeError("Unable to initialize 'cuda'")])
def why(request, monkeypatch):
    """What JAX raises where it was told to use CUDA and cannot."""

    def start():
        raise request.param

    monkeypatch.setattr(program_module, "backends", start)
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda")
    yield str(request.param)
    jax.config.update("jax_platforms", asked)


NAMED = "JAX_PLATFORMS must name platforms that JAX can start here, got 'cuda': "


@pytest.mark.parametrize("command", [["info"], ["demo"], ["plan", "somewhere:problem"]])
def test_a_platform_that_jax_cannot_start(monkeypatch, tmp_path, command, why):
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(cli.app, command)
    assert outcome.exit_code == 2
    assert f"{NAMED}{why or 'there is no such device'}" in outcome.stderr
    assert "JAX_PLATFORMS=cpu" in outcome.stderr and "Traceback" not in outcome.output


EYE, ONES = np.eye(3, dtype=np.float32), np.ones(3, np.float32)
CALLS = {
    "hessian": lambda: cx.hessian(lambda params, batch: params @ batch, ONES, ONES),
    "from_matvec": lambda: cx.from_matvec(lambda v: 2 * v, 3) @ ONES,
    "eigsh": lambda: cx.eigsh(EYE, 1),
    "plan": lambda: cx.plan(EYE, 1),
    "sharpness": lambda: cx.sharpness(EYE),
    "trace": lambda: cx.trace(EYE),
    "diagonal": lambda: cx.diagonal(EYE),
    "spectral_density": lambda: cx.spectral_density(EYE),
    "log_det": lambda: cx.log_det(EYE),
    "lanczos_tridiagonal": lambda: cx.lanczos_tridiagonal(EYE, 2),
    "power_iteration": lambda: cx.power_iteration(EYE),
    "solve": lambda: cx.solve(EYE, ONES),
    "models": gpt.load,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_the_library_on_a_platform_that_jax_cannot_start(name, why):
    """Without a word of ours JAX's own AssertionError has none at all."""
    with pytest.raises(ValueError, match=NAMED + (why or "there is no such device")):
        CALLS[name]()
