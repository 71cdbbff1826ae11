"""The emulated GPU finds what is wrong: device code with a barrier removed, or off by one, fails.

Each mutant is a copy of the kernels with one change, of which the parts that it reaches are built
and given the same checks as the code that is shipped. Every barrier is removed once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.native.mutants import CUDA, OFF_BY_ONE, ON_TENSOR_CORES, barriers, changes

ROOT = Path(__file__).parents[2]
SIMT = ROOT / "tests" / "native" / "simt"
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
FLAGS += ["-DCURVAX_SIMT", "-DCURVAX_TARGET=simt_device", f"-I{SIMT.parent}"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_with(*arguments):
    subprocess.run([COMPILER, *FLAGS, *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The objects of the emulation, which no mutant changes."""
    folder = tmp_path_factory.mktemp("emulator")
    objects = []
    for source in ("mma.cc", "simt.cc"):
        objects.append(folder / f"{source}.o")
        include = ROOT / "kernels"
        compile_with("-c", SIMT / source, f"-I{include}", f"-I{include}/include", "-o", objects[-1])
    return objects


def fails(part, kernels, emulator, folder):
    """Whether a part of the kernels fails its checks, in a process of its own, and what is said."""
    library = folder / f"{part}.so"
    include = [f"-I{kernels}", f"-I{kernels / 'include'}"]
    compile_with("-shared", SIMT / f"exports_{part}.cc", *emulator, *include, "-o", library)
    command = [sys.executable, "-m", "tests.native.emulated_checks", part, str(library)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    return result.returncode != 0, result.stderr


@pytest.mark.parametrize(
    "part", ["softmax_ce", "block_ortho", pytest.param("tensor_cores", marks=pytest.mark.slow)]
)
def test_the_code_as_it_is(part, emulator, tmp_path):
    failed, said = fails(part, ROOT / "kernels", emulator, tmp_path)
    assert not failed, said


def parts_of(file):
    """The parts that a file of the device code reaches, the likeliest to notice first."""
    if file.startswith("softmax_ce"):
        return ["softmax_ce"]
    return ["block_ortho", "softmax_ce"] if file == "device.cuh" else ["block_ortho"]


# Files that only blocks on tensor cores take.
TENSOR = ("mma.cuh", "tensor_sums.cuh", "tensor_tiles.cuh", "tensor_update.cuh")


def mutants():
    for mutant in (*barriers(), *changes(OFF_BY_ONE)):
        parts = ["tensor_cores"] if mutant.file in TENSOR else parts_of(mutant.file)
        yield pytest.param(mutant, parts, id=mutant.name)
    for mutant in changes(ON_TENSOR_CORES):
        yield pytest.param(mutant, ["tensor_cores"], id=mutant.name)


@pytest.mark.thin(16)
@pytest.mark.parametrize(("mutant", "parts"), list(mutants()))
def test_a_broken_kernel_is_found(mutant, parts, emulator, tmp_path):
    kernels = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", kernels)
    text = mutant.made((CUDA / mutant.file).read_text())
    (kernels / "cuda" / mutant.file).write_text(text)
    assert any(fails(part, kernels, emulator, tmp_path)[0] for part in parts)
