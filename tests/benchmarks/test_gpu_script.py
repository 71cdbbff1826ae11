"""What `benchmarks/gpu.sh` makes of its tools' output, and the line of `curvax info`: no device."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from benchmarks.gpu.report import driver, sanitized
from benchmarks.gpu.report import tests as counts

from curvax import _native
from curvax.cli.machine import cuda_module

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("log", "text", "fine"),
    [
        ("ERROR SUMMARY: 0 errors\nexit status 0", "no errors", True),
        ("Unable to open x\nERROR SUMMARY: 3 errors\nexit status 9", "3 errors", False),
        ("RACECHECK SUMMARY: 2 hazards displayed\nexit status 0", "2 errors", False),
        (
            "Device not supported\nERROR SUMMARY: 1 error\nexit status 1",
            "skipped: the device",
            True,
        ),
        ("Device not supported\nexit status 1", "skipped: the device", True),
        ("compute-sanitizer: command not found\nexit status 127", "skipped: compute", True),
        ("ERROR SUMMARY: 0 errors\nexit status 1", "exit status 1", False),
        ("killed\nexit status 124", "exit status 124", False),
    ],
)
def test_a_sanitizers_log(log, text, fine):
    said, passed = sanitized(log)
    assert text in said and passed is fine


def test_a_drivers_log():
    log = "\n".join(
        [
            "NVIDIA H200, 132 processors, compute capability 9.0; kernels for 90-real",
            "softmax_ce float32 (3, 7) loss: 1.0e-08 of 1.9e-06 ",
            "softmax_ce float32 (3, 7) products: 1.0e-02 of 1.9e-06 FAILED",
            "copy: 4300 GB/s by the driver, 4200 by a kernel",
            "block_ortho m=64 b=8 n=1: 9.0 ms, 3440 GB/s, 80.0 % of copy, target 80 %",
            "FAILED: rotate_basis: out of memory",
        ]
    )
    assert [name for name, _ in driver(log)] == [
        "softmax_ce float32 (3, 7) products",
        "block_ortho m=64 b=8 n=1",
        "FAILED",
    ]


def test_a_report_that_pytest_did_not_write(tmp_path):
    assert counts(tmp_path / "test.xml")["failed"]


@pytest.mark.parametrize(
    "stage",
    [
        [],
        ["everything"],
        ["test", "slow"],
        ["driver", "x"],
        ["all", "a", "b"],
        ["bench", "copy", "x"],
    ],
)
def test_a_stage_that_does_not_exist(stage, tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *stage]
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert outcome.returncode == 2 and "gpu.sh sanitize" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_a_tool_that_finds_errors_fails_its_stage(tmp_path):
    """Whatever the other says, and with its own exit status."""
    logs = {
        "memcheck": "ERROR SUMMARY: 4 errors\nexit status 9",
        "racecheck": "RACECHECK SUMMARY: 0 hazards\nexit status 0",
    }
    command = [sys.executable, "-m", "benchmarks.gpu.report", "sanitize", "--out", str(tmp_path)]
    for name, log in logs.items():
        (tmp_path / f"{name}.log").write_text(log)
        command += ["--log", str(tmp_path / f"{name}.log")]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert outcome.returncode == 1
    assert "4 errors, exit status 9" in outcome.stdout and "no errors" in outcome.stdout


@pytest.mark.parametrize(
    ("architectures", "text"),
    [
        ("80 90-real 120-real", "capability 8.0, 9.0, 12.0; PTX of 8.0 for others"),
        ("90a-real", "capability 9.0a"),
        ("80 90-virtual", "capability 8.0; PTX of 8.0, 9.0 for others"),
        ("120-virtual", "capability none; PTX of 12.0 for others"),
        ("native", "capability native"),
    ],
)
def test_architectures_in_the_line_of_info(architectures, text, monkeypatch):
    facts = {"architectures": architectures, "runtime": 13000}
    monkeypatch.setattr(_native, "build_info", lambda platform: facts)
    assert cuda_module() == f"CUDA 13.0, for compute {text}"
