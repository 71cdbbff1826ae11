"""Annotations are true, shapes included; and few of them say nothing."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "python" / "curvax"


@pytest.mark.parametrize("options", [[], pytest.param(["--all"], marks=pytest.mark.slow)])
def test_what_the_public_functions_take_and_return_is_what_their_annotations_say(options):
    """In a process of its own: the checks come in with the import of the package."""
    command = [sys.executable, "-m", "tests.checked_types", *options]
    # Most of the time goes into compilation.
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    root = PACKAGE.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=quick)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-4000:]


def test_few_lines_of_the_package_say_any():
    """A pytree, an array, a function has a type; `object` is for what is checked at once."""
    lines = [line for path in PACKAGE.rglob("*.py") for line in path.read_text().splitlines()]
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) < 250
