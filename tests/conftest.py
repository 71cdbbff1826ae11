"""Strict JAX settings, seeds and skips shared by all tests."""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

# Most of the tests' time goes into compilation, a third of it into LLVM's optimisation, which
# programs this small do not repay. XLA:CPU compiles an HVP sooner still by its older emitters,
# which jaxlib had until 0.10. XLA_FLAGS= runs the tests with XLA's own choice, as `.ci/run pure`
# does. Set here, before JAX is imported, so that programs which tests start have it too.
_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _native_available() -> bool:
    return importlib.util.find_spec("curvax._native._cpu") is not None


# A test that names a kernel is skipped only where the package was built without any. With
# CURVAX_REQUIRE_NATIVE=1 (continuous integration) a missing kernel is a failure instead.
requires_native = pytest.mark.skipif(
    not _native_available() and os.environ.get("CURVAX_REQUIRE_NATIVE") != "1",
    reason="curvax was installed without compiled kernels (CURVAX_NO_NATIVE)",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `thin(k)` leave the first case, the last, and of the others one in k.

    The rest are slow. Which stay is a function of their names alone, so that no value of a
    parameter is left out as every k-th case of a grid would leave it out.
    """
    grids = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("thin") and not item.get_closest_marker("slow"):
            grids[item.nodeid.partition("[")[0]].append(item)
    for cases in grids.values():
        for item in cases[1:-1]:
            (k,) = item.get_closest_marker("thin").args
            if zlib.crc32(item.name.encode()) % k:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """JAX keeps the programs of all tests that a process runs, which are gigabytes in the end."""
    yield
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > 3e9:
        jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250131)


@pytest.fixture(params=[pytest.param("ffi", marks=requires_native), "reference"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[pytest.param("ffi", marks=requires_native)])
def native_kernels(request: pytest.FixtureRequest) -> None:
    """For a test that names a kernel."""
