"""Of an installation into a folder that another one was built in before."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_settings_are_those_of_one_installation(tmp_path):
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    assert cmake, "cmake is not installed"

    def warnings_are_errors(*defines):
        line = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(tmp_path),
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCURVAX_MAX_FFI_API_MINOR=99",  # the headers are those of the JAX that tests run with
        ]
        done = subprocess.run([*line, *defines], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return "-Werror" in (tmp_path / "compile_commands.json").read_text()

    assert not warnings_are_errors("-DSKBUILD=2", "-DCURVAX_WERROR=OFF")
    assert warnings_are_errors("-DSKBUILD=2")
    # By hand they stay, as where a build runs CMake again.
    assert not warnings_are_errors("-USKBUILD", "-DCURVAX_WERROR=OFF")
    assert not warnings_are_errors()
