"""`curvax` as a process: exit statuses, and Ctrl-C at every moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from curvax import _native


def curvax_command(*arguments):
    return [str(Path(sys.executable).with_name("curvax")), *map(str, arguments)]


@pytest.mark.skipif(not _native.available(), reason="built without the compiled module")
def test_a_bad_target_is_one_line_and_lists_the_others(monkeypatch):
    monkeypatch.setenv("CURVAX_ISA", "bogus")
    outcome = subprocess.run(curvax_command("info"), capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    (message,) = outcome.stderr.splitlines()
    assert message.startswith("error: CURVAX_ISA must be one of base")
    assert "got 'bogus'; unset it" in message


def test_a_bad_target_spoils_only_what_needs_the_kernels(monkeypatch):
    monkeypatch.setenv("CURVAX_ISA", "bogus")
    outcome = subprocess.run(curvax_command("--version"), capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_small_budget_end_to_end(tmp_path):
    arguments = ["demo", "--out", tmp_path, "--max-matvecs", 12, "--high", 2, "--low", 1]
    outcome = subprocess.run(curvax_command(*arguments), capture_output=True, text=True)
    assert outcome.returncode in (0, 3), outcome.stderr
    written = json.loads((tmp_path / "spectrum.json").read_text())
    assert written["eigenvalues"][0] == pytest.approx(151.5556, abs=0.1)
    assert written["num_matvecs"] <= 12
    assert (outcome.returncode == 0) == all(written["converged"])


@pytest.mark.slow
def test_full_demo_end_to_end(tmp_path):
    outcome = subprocess.run(curvax_command("demo", "--out", tmp_path), capture_output=True)
    assert outcome.returncode == 0, outcome.stderr
    written = json.loads((tmp_path / "spectrum.json").read_text())
    # Found by SciPy's eigsh, at tol 1e-4, with the plain product jvp(grad).
    high = [151.5556, 40.4862, 33.7897, 30.9920, 28.0258, 26.6659, 23.8076, 22.7980]
    low = [-3.5361, -4.2166, -4.5588, -4.7149]
    np.testing.assert_allclose(written["eigenvalues"][:8], high, atol=1e-3)
    np.testing.assert_allclose(written["eigenvalues"][-4:], low, atol=1e-3)
    assert abs(written["eigenvalues"][10] + 3.1558) <= written["residuals"][10]


# A program that does not inherit a background job's deafness to Ctrl-C.
ATTENTIVE = """
import contextlib, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import curvax
from curvax.__main__ import main
%s
sys.argv[1:1] = ["demo", "--out"]
main()
"""
# The same, with a Hessian or a solver that is interrupted by hand.
INTERRUPTED = """
def stand_in(*args, **options):
    {event}
    raise SystemExit(7)
curvax.{name} = stand_in
"""
# The same, interrupted when a module is looked for.
INTERRUPTED_IMPORT = """
class Finder:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
SWALLOWED = "with contextlib.suppress(BaseException): signal.raise_signal(signal.SIGINT)"
COMPILING = "threading.Thread(target=time.sleep, args=(100,)).start(); raise KeyboardInterrupt"


def program(setting, out):
    return [sys.executable, "-c", ATTENTIVE % setting, str(out)]


@pytest.mark.thin(4)
@pytest.mark.parametrize("name, event", [("hessian", SWALLOWED), ("eigsh", COMPILING)])
def test_an_interrupt_ends_the_program_whatever_jax_does(tmp_path, name, event):
    command = program(INTERRUPTED.format(name=name, event=event), tmp_path)
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (outcome.returncode, outcome.stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert "Traceback" not in outcome.stderr and not list(tmp_path.iterdir())


def test_a_background_job_ignores_interrupts(tmp_path):
    setting = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    setting += INTERRUPTED.format(name="hessian", event=SWALLOWED)
    assert subprocess.run(program(setting, tmp_path), capture_output=True).returncode == 7


@pytest.mark.thin(4)
@pytest.mark.parametrize("delay", [0, 0.3, 0.8, 1.5, 2.2, 3])
def test_ctrl_c_while_the_model_compiles(tmp_path, delay):
    with subprocess.Popen(program("", tmp_path), stderr=subprocess.PIPE, text=True) as process:
        first = process.stderr.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert first.startswith("loading") and process.returncode == 130
    if "compiling the matrix" not in rest:  # a fast machine may be solving already
        assert (rest, list(tmp_path.iterdir())) == ("error: interrupted\n", [])


@pytest.mark.parametrize("module", ["typer", "jax", "scipy.sparse"])
def test_ctrl_c_while_modules_are_imported(tmp_path, module):
    setting = INTERRUPTED_IMPORT.format(module=module)
    outcome = subprocess.run(program(setting, tmp_path), capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert "Traceback" not in outcome.stderr


@pytest.mark.slow
def test_ctrl_c_end_to_end(tmp_path):
    arguments = curvax_command("demo", "--out", tmp_path, "--tol", "1e-6")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "products" in line:
                break
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    written = json.loads((tmp_path / "spectrum.json").read_text())
    assert written["interrupted"] and not any(written["converged"])
