"""What `make demo` says, with an interpreter that stands in for Python and pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Makes an environment of itself, and a wheel; logs what pip is asked for.
STAND_IN = """#!/bin/sh
echo "$@" >> log
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp curvax "$3/bin/curvax";;
  *" wheel "*) [ -e broken ] && { echo "error: no compiler" >&2; exit 1; }
    mkdir .venv/wheel; touch .venv/wheel/curvax-0.1.0-cp311.whl;;
esac
exit 0
"""
STEPS = [
    "making the environment .venv",
    "compiling the kernels, which takes a minute or two",
    "installing curvax, JAX, and what the command line and pictures need",
    "running .venv/bin/curvax demo --low 2",
    "the demo --low 2",
]


@pytest.fixture
def make(tmp_path):
    for folder in ("cmake", "csrc", "kernels", "tests/native", "python"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in (("fake", STAND_IN), ("curvax", '#!/bin/sh\necho "the $@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run():
        arguments = ["make", "demo", "PYTHON=./fake", "DEMO_ARGS=--low 2"]
        # As from a shell, also where these tests are run by make.
        outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=outside)

    return run


def test_a_line_per_step_and_nothing_else(make, tmp_path):
    first, again = make(), make()
    assert (first.stdout.splitlines(), first.stderr, first.returncode) == (STEPS, "", 0)
    asked = (tmp_path / "log").read_text()
    wheel = ".venv/wheel/curvax-0.1.0-cp311.whl"
    assert f"install {wheel}[cli,plot]\n" in asked
    # pip takes a wheel of the same version for the one that is there.
    assert f"install --no-deps --force-reinstall {wheel}\n" in asked
    assert (again.stdout.splitlines(), again.stderr) == (STEPS[3:], "")
    (tmp_path / "python" / "changed.py").touch()
    assert make().stdout.splitlines() == STEPS[1:]


def test_an_error_is_shown_and_ends_it(make, tmp_path):
    (tmp_path / "broken").touch()
    outcome = make()
    assert outcome.returncode != 0 and "error: no compiler" in outcome.stderr
    assert [line for line in outcome.stdout.splitlines() if line in STEPS] == STEPS[:2]
    (tmp_path / "broken").unlink()
    assert make().stdout.splitlines() == STEPS[1:]
