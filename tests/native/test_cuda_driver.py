"""`cuda_driver` compiles and links, warnings as errors, and says that there is no device."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.native.cuda_resources import BUDGET, ROOT, nvcc

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(
        nvcc() is None and os.environ.get("CURVAX_REQUIRE_NVCC") != "1",
        reason="nvcc is not installed",
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Built as by `benchmarks/gpu.sh`, for one architecture."""
    folder = tmp_path_factory.mktemp("driver")
    # Beside the interpreter where it came as a package.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "cmake is not installed"
    settings = {
        "CMAKE_CUDA_ARCHITECTURES": "90-real",
        "CURVAX_CUDA": "ON",
        "CURVAX_CUDA_DRIVER": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *defines],
        [cmake, "--build", str(folder), "--target", "cuda_driver", "--parallel", "2"],
    ):
        environment = {**os.environ, "PATH": path}
        outcome = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-3000:]
    return folder / "tests" / "native" / "cuda_driver"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "cuda_driver check | time"),
        (["check", "softmax_ce"], 2, "cuda_driver check | time"),
        (["time", "matmul_sum"], 2, "cuda_driver check | time"),
        (["check"], 3, "there is no CUDA device that can run them"),
        (["time", "block_ortho"], 3, "there is no CUDA device that can run them"),
    ],
)
def test_what_it_says_without_a_device(driver, arguments, status, text):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    outcome = subprocess.run([driver, *arguments], capture_output=True, text=True, env=environment)
    assert (outcome.returncode, text in outcome.stdout) == (status, True), outcome.stdout


def test_all_kernels_are_loaded_before_one_is_called(driver):
    """Those whose registers are counted; without a device each is asked for all the same."""
    outcome = subprocess.run([driver, "check"], capture_output=True, text=True)
    assert int(re.search(r"(\d+) kernels for", outcome.stdout)[1]) == len(
        json.loads(BUDGET.read_text())
    )
