"""Targets of the machine, and the module that exposes the kernels to NumPy."""

from __future__ import annotations

import pytest

native = pytest.importorskip(
    "curvax_native_tests", reason="built only with -DCURVAX_NATIVE_TESTS=ON"
)


@pytest.fixture(params=native.targets())
def cpu_target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[*native.targets(), "gpu"])
def target(request: pytest.FixtureRequest) -> str:
    """A target of the CPU, or the emulated GPU."""
    return request.param
