"""Tests that need a CUDA device, and how to try them without one.

CURVAX_CUDA_TESTS=anywhere runs them on the default device, whatever it is: the tests themselves are
then what is tested.
"""

from __future__ import annotations

import os

import pytest

from curvax import _native


@pytest.fixture(autouse=True)
def needs_a_device():
    if os.environ.get("CURVAX_CUDA_TESTS") == "anywhere":
        return
    if _native.platform() != "cuda":
        pytest.skip("JAX has no CUDA device")
    assert _native.available("block_ortho"), "curvax was built without CURVAX_CUDA=ON"
