"""The device code compiles for every architecture without a warning, and keeps to its budget.

No spills, and no more registers or static shared memory than `cuda_budget.json` says, which
`cuda_resources.py --write` makes anew. Needs nvcc and no GPU.
"""

from __future__ import annotations

import json
import os
import re

import pytest
from tests.native.cuda_resources import (
    ARCHITECTURES,
    BUDGET,
    ROOT,
    SOURCES,
    compile_kernels,
    nvcc,
    resources,
)

needs_nvcc = [
    pytest.mark.nvcc,
    pytest.mark.skipif(
        nvcc() is None and os.environ.get("CURVAX_REQUIRE_NVCC") != "1",
        reason="nvcc is not installed",
    ),
]


@pytest.mark.parametrize("source", [pytest.param(s, marks=needs_nvcc) for s in SOURCES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_to_their_budget(architecture, source):
    budget = json.loads(BUDGET.read_text())
    found = resources(compile_kernels(source, architecture))
    assert bool(found) == (source != "module")  # which launches nothing of its own
    for name, used in found.items():
        assert used["spills"] == 0, f"{name} spills {used['spills']} bytes"
        assert used["shared"] <= budget[name]["shared"], name
        assert used["registers"] <= budget[name]["registers"][architecture], name


def test_the_budget_covers_every_architecture_that_is_built():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    default = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)", cmake)[1]
    built = {f"sm_{target.removesuffix('-real')}" for target in default.split()}
    assert built == set(ARCHITECTURES)
    assert sum("-" not in target for target in default.split()) == 1  # one PTX
    for name, entry in json.loads(BUDGET.read_text()).items():
        assert set(entry["registers"]) == set(ARCHITECTURES), name
