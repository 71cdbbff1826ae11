"""A launcher asks every device once: on two devices of a runtime that only writes a log."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = pathlib.Path(__file__).with_name("fake_cuda")
    kernels = ROOT / "kernels"
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags += ["-DCURVAX_TARGET=cuda", f"-I{folder}", f"-I{kernels}", f"-I{kernels / 'include'}"]
    path = tmp_path_factory.mktemp("launcher") / "launcher.so"
    subprocess.run([COMPILER, *flags, str(folder / "launcher.cc"), "-o", str(path)], check=True)
    return path


@pytest.fixture
def library(compiled, tmp_path):
    """Loaded anew for each test, and with it what the launcher remembers."""
    library = ctypes.CDLL(shutil.copy(compiled, tmp_path))
    for function in (library.launch, library.residents, library.calls):
        function.restype = ctypes.c_char_p
    library.launch.argtypes = [ctypes.c_int, ctypes.c_int, *2 * [ctypes.c_int64], ctypes.c_bool]
    library.residents.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
    return library


def launch(library, device, kernel, shared_bytes, blocks=5, fails=False):
    """The error, and the calls that were made."""
    error = library.launch(device, kernel, blocks, shared_bytes, fails)
    return error, library.calls().decode().splitlines()


def test_a_device_is_asked_once_and_told_once_for_each_kernel(library):
    first, second = "launch first 5 64 60000", "launch second 5 64 60000"
    assert launch(library, 0, 0, 60000) == (
        None,
        ["shared limit on 0", "first may have 100000 on 0", f"{first} on 0"],
    )
    assert launch(library, 0, 0, 60000) == (None, [f"{first} on 0"])
    assert launch(library, 0, 1, 60000) == (
        None,
        ["second may have 100000 on 0", f"{second} on 0"],
    )
    # Another device has another limit, and settings of its own.
    assert launch(library, 1, 0, 60000) == (
        None,
        ["shared limit on 1", "first may have 100001 on 1", f"{first} on 1"],
    )
    for device in (0, 1, 0):
        assert launch(library, device, 0, 60000) == (None, [f"{first} on {device}"])


def test_little_shared_memory_is_not_asked_for(library):
    assert launch(library, 1, 0, 48 << 10) == (None, ["launch first 5 64 49152 on 1"])
    assert launch(library, 1, 0, 60000, blocks=0) == (None, [])


def test_a_failure_is_told_and_asked_again(library):
    error, calls = launch(library, 0, 0, 60000, fails=True)
    assert error == b"invalid value"
    assert not any(call.startswith("launch") for call in calls)
    error, calls = launch(library, 0, 0, 60000)
    assert error is None
    assert calls[-2:] == ["first may have 100000 on 0", "launch first 5 64 60000 on 0"]
    error, calls = launch(library, 0, 0, 100, blocks=1 << 31)
    assert error == b"more blocks than a grid can have" and calls == []


def residents(library, device, shared_bytes):
    """The error, the number, and the calls that were made."""
    blocks = ctypes.c_int64(-1)
    error = library.residents(device, shared_bytes, ctypes.byref(blocks))
    return error, blocks.value, library.calls().decode().splitlines()


def test_resident_blocks_are_those_of_the_current_device(library):
    asked = "occupancy of second 64 60000 on"
    error, blocks, calls = residents(library, 0, 60000)
    assert (error, blocks) == (None, 3 * 10)
    assert calls.index("second may have 100000 on 0") < calls.index(f"{asked} 0")
    assert residents(library, 1, 60000)[:2] == (None, 3 * 11)
    assert residents(library, 0, 60000) == (None, 3 * 10, [f"{asked} 0"])
    # A grid of no blocks would leave the results as they were, in silence.
    assert residents(library, 2, 60000)[0] == b"a kernel that does not fit the device"
