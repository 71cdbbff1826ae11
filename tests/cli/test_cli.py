"""The command line: what it prints, writes and returns, with a solver made by hand."""

import json
import os
import re
import signal
import subprocess
import sys
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from tests.results.fake_results import fake_progress, fake_result
from typer.testing import CliRunner

import curvax
from curvax import _native, cli
from curvax.warnings import ConvergenceWarning

native = pytest.mark.skipif(not _native.available(), reason="built without the compiled module")


class FakeHessian:
    shape = (862464, 862464)
    dtype = np.dtype(np.float32)
    space = types.SimpleNamespace(names=("head",))
    loss = jnp.float32(2.036439)
    seconds = types.MappingProxyType({"compile": 1.5, "trace": 0.25, "total": 1.75})


class FakeSolver:
    """Stands in for `curvax.eigsh`: reports progress, returns or raises what it was given."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.steps = 60

    def __call__(self, op, k, **options):
        self.k, self.options = k, options
        for step in range(1, self.steps + 1):
            options["callback"](fake_progress(step))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def solver(monkeypatch):
    solver = FakeSolver(fake_result())
    fitting = types.SimpleNamespace(fits=True, block_size=1, max_basis=40, basis_dtype="float32")
    monkeypatch.setattr(curvax, "hessian", lambda *args, **options: FakeHessian(), raising=False)
    monkeypatch.setattr(curvax, "plan", lambda *args, **options: fitting, raising=False)
    monkeypatch.setattr(curvax, "eigsh", solver, raising=False)
    monkeypatch.setattr(curvax, "ConvergenceWarning", ConvergenceWarning, raising=False)
    return solver


def run(*args, **env):
    environment = {"COLUMNS": "80", "FORCE_COLOR": None, "NO_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env=environment | env)


def table_rows(text):
    """The cells of the table's rows, as text."""
    lines = [line.replace("┃", "│").split("│") for line in text.splitlines() if "│" in line]
    return [[cell.strip() for cell in cells[1:-1]] for cells in lines]


# --- the demo's report ---------------------------------------------------------------------------


def test_demo_prints_what_it_writes(solver, tmp_path):
    out = tmp_path / "new" / "out"
    outcome = run("demo", "--out", out)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((out / "spectrum.json").read_text())
    rows = table_rows(outcome.stdout)
    assert [row[0] for row in rows] == [str(i) for i in [*range(1, 11), *range(-5, 0)]]
    np.testing.assert_allclose([float(row[1]) for row in rows], written["eigenvalues"], atol=5e-6)
    np.testing.assert_allclose([float(row[2]) for row in rows], written["residuals"], rtol=5e-3)
    np.testing.assert_allclose([float(row[3]) for row in rows], written["residuals"], rtol=5e-3)
    relative = np.divide(written["residuals"], np.abs(written["eigenvalues"]))
    np.testing.assert_allclose([float(row[4]) for row in rows], relative, rtol=5e-3)
    assert [row[5] for row in rows] == ["✓"] * 15
    with np.load(out / "spectrum.npz") as arrays:
        np.testing.assert_array_equal(arrays["eigenvalues"], written["eigenvalues"])
    assert imread(out / "spectrum.png").std() > 0.05


def test_demo_names_model_and_certificates(solver, tmp_path):
    text = " ".join(run("demo", "--out", tmp_path).stdout.split())
    for fact in (
        "862,464 parameters",
        "problem curvax.models.gpt:make_problem",
        "16 sequences of English, 1,024 predicted bytes; nats per byte",
        "loss 2.03644",
        "construction 1.75 in all: compile 1.50, trace 0.25",
        "10 highest and 5 lowest",
        "tol_effective 1.00e-03",
        "noise 3.0e-06",
        "orthogonality 2.0e-07",
        "complete not checked",
        "products 60 solve + 15 verification",
        "restarts 1",
        "18.38 in all: compile 5.00, products 10.00, orthogonalization 0.25, host 0.12",
        "all 15 eigenpairs converged",
    ):
        assert fact in text, fact


def test_demo_asks_what_the_options_say(solver, tmp_path):
    arguments = "--high 3 --low 12 --tol 1e-2 --max-matvecs 99 --seed 7 --certify complete"
    run("demo", "--out", tmp_path, *arguments.split())
    expected = dict(which="BE", tol=1e-2, max_matvecs=99, seed=7, certify="complete")
    assert solver.k == (3, 12)
    assert {name: solver.options[name] for name in expected} == expected


@pytest.mark.parametrize(
    "complete, text", [(True, "none was left to find"), (False, "some may be missing")]
)
def test_demo_says_what_the_search_found(solver, tmp_path, complete, text):
    solver.outcome = fake_result(complete=complete)
    assert text in run("demo", "--out", tmp_path).stdout


def test_not_converged_exits_with_3_and_still_writes(solver, tmp_path):
    residuals = np.full(15, 1e-3)
    residuals[[1, 14]] = 0.5
    solver.outcome = fake_result(residuals=residuals)
    outcome = run("demo", "--out", tmp_path, "--max-matvecs", 60)
    assert outcome.exit_code == 3
    assert [row[5] for row in table_rows(outcome.stdout)].count("✗") == 2
    assert "not converged: 2 of 15 eigenpairs, after 60 products" in outcome.stdout
    assert "--max-matvecs" in outcome.stdout
    names = ("spectrum.npz", "spectrum.json", "spectrum.txt", "spectrum.png", "config.json")
    assert {p.name for p in tmp_path.iterdir()} == set(names)


def test_an_interrupted_solve_keeps_what_is_known(solver, tmp_path):
    solver.outcome = fake_result(residuals=np.full(15, np.nan), interrupted=True)
    outcome = run("demo", "--out", tmp_path)
    assert outcome.exit_code == 130
    rows = table_rows(outcome.stdout)
    assert {row[2] for row in rows} == {"-"} and {row[5] for row in rows} == {"not verified"}
    assert "-" in (tmp_path / "spectrum.txt").read_text() and "nan" not in outcome.stdout
    verdict = "interrupted: 0 of the 15 wanted eigenpairs converged, 15 are not verified"
    assert verdict in outcome.stdout
    written = json.loads((tmp_path / "spectrum.json").read_text())
    assert written["interrupted"] and written["residuals"] == [None] * 15
    assert (tmp_path / "spectrum.png").exists()


def test_too_few_pairs_have_no_index(solver, tmp_path):
    unknown = dict(residuals=[np.nan, np.nan], interrupted=True, indices=np.zeros(2, int))
    solver.outcome = fake_result([3.0, -1.0], **unknown)
    text = run("demo", "--out", tmp_path).stdout
    assert [row[:2] for row in table_rows(text)] == [["?", "3.00000"], ["?", "-1.00000"]]
    assert "interrupted: 0 of the 15 wanted eigenpairs converged" in text


def test_an_interrupt_before_anything_is_known(solver, tmp_path):
    solver.outcome = KeyboardInterrupt()
    outcome = run("demo", "--out", tmp_path)
    assert (outcome.exit_code, outcome.stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_during_the_report_does_not_cut_it_short(solver, tmp_path, monkeypatch):
    def plot(result, path=None, title=None):
        signal.raise_signal(signal.SIGINT)
        path.write_text("a picture")

    monkeypatch.setattr("curvax.plot.plot", plot)
    outcome = run("demo", "--out", tmp_path)
    assert outcome.exit_code == 130 and "interrupted" not in outcome.output
    last = outcome.stdout.splitlines()[-2:]
    assert last[0].endswith("spectrum.png") and last[1].endswith("config.json")


def test_warnings_of_the_solver_are_notes(solver, tmp_path, monkeypatch):
    def warn(*args, **options):
        warnings.warn("the backend is odd", RuntimeWarning, stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)
        warnings.warn("said below the table", ConvergenceWarning, stacklevel=1)
        return fake_result()

    monkeypatch.setattr(curvax, "eigsh", warn)
    outcome = run("demo", "--out", tmp_path)
    assert outcome.stdout.count("note: ") == 1 and "note: the backend is odd" in outcome.stdout


def test_without_matplotlib_there_is_a_note_and_no_picture(solver, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = run("demo", "--out", tmp_path)
    assert outcome.exit_code == 0
    assert "pip install 'curvax[plot]'" in outcome.stdout
    assert {p.suffix for p in tmp_path.iterdir()} == {".npz", ".json", ".txt"}


# --- where it is printed -------------------------------------------------------------------------


def test_quiet_prints_nothing(solver, tmp_path):
    outcome = run("demo", "--quiet", "--out", tmp_path)
    assert (outcome.exit_code, outcome.output) == (0, "")
    assert (tmp_path / "spectrum.png").exists()


def test_a_log_has_plain_sparse_lines(solver, tmp_path):
    outcome = run("demo", "--out", tmp_path)
    assert all(c == "\n" or c.isprintable() for c in outcome.output)
    progress = [line for line in outcome.stderr.splitlines() if "products" in line]
    assert progress[0].startswith("1 products  0/15 pairs") and progress[0].endswith("left ?")
    assert progress[-1] == "60 products  15/15 pairs  measuring residuals"
    assert len(progress) == 2
    assert "compiling" in outcome.stderr and "compiling" not in outcome.stdout


def test_nothing_but_paths_is_wider_than_the_terminal(solver, tmp_path):
    on_terminal = dict(TTY_COMPATIBLE="1", TERM="xterm-256color", NO_COLOR="1")
    out = tmp_path / ("long-name" * 12)
    lines = run("demo", "--out", out, **on_terminal).stdout.splitlines()
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert max(len(line) for line in lines if not line.startswith("wrote")) <= 80
    assert any(line.endswith("spectrum.json") for line in lines)


def test_a_terminal_gets_a_bar(solver, tmp_path):
    solver.steps = 40
    outcome = run("demo", "--out", tmp_path, TTY_COMPATIBLE="1", TERM="xterm-256color")
    assert "compiling the solver" in outcome.stderr
    assert "40 products  10/15 pairs  residual 1.0e-02" in outcome.stderr
    assert "\x1b[" in outcome.stderr


def test_no_color_is_respected(solver, tmp_path):
    solver.outcome = fake_result(residuals=np.ones(15))
    on_terminal = dict(TTY_COMPATIBLE="1", TERM="xterm-256color")
    assert "\x1b[1;31m" in run("demo", "--out", tmp_path, **on_terminal).stdout
    plain = run("demo", "--out", tmp_path, NO_COLOR="1", **on_terminal).stdout
    assert "31m" not in plain and "not converged" in plain


def test_marks_are_ascii_where_the_encoding_is(solver, tmp_path):
    runner = CliRunner(charset="ascii")
    text = runner.invoke(cli.app, ["demo", "--out", str(tmp_path)], env={"COLUMNS": "80"}).stdout
    assert text.isascii() and text.count(" yes ") == 15


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, option",
    [
        (["--tol", "0"], "--tol"),
        (["--tol", "nan"], "--tol"),
        (["--tol", "x"], "--tol"),
        (["--high", "-1"], "--high"),
        (["--high", "0", "--low", "0"], "--low"),
        (["--max-matvecs", "0"], "--max-matvecs"),
        (["--max-matvecs", "14"], "--max-matvecs"),
        (["--seed", "-1"], "--seed"),
        (["--certify", "hope"], "--certify"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_options_are_named(solver, tmp_path, arguments, option):
    outcome = run("demo", "--out", tmp_path / "new", *arguments)
    assert outcome.exit_code == 2
    assert option in outcome.stderr.splitlines()[-1] and "Traceback" not in outcome.output
    assert "loading" not in outcome.stderr
    assert not outcome.stdout and not list(tmp_path.iterdir())


def test_out_must_be_a_directory(solver, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = run("demo", "--out", tmp_path / "file")
    assert outcome.exit_code == 2 and "--out" in outcome.stderr


def test_errors_of_the_solver_have_no_traceback(solver, tmp_path):
    solver.outcome = ValueError("CURVAX_IMPL must be 'auto' or 'reference'")
    outcome = run("demo", "--out", tmp_path)
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1] == f"error: {solver.outcome}"


@pytest.mark.parametrize(
    "command, remedy",
    [
        (["demo"], "lower --high, --low"),
        (["spectrum", "--model", "gpt"], "raise --limit or lower -k"),
    ],
)
def test_too_little_memory_is_said_in_options(solver, tmp_path, monkeypatch, command, remedy):
    class Plan:
        fits = False

        def __str__(self):
            return "the forecast"

    monkeypatch.setattr(curvax, "plan", lambda *args, **options: Plan())
    outcome = run(*command, "--out", tmp_path)
    assert outcome.exit_code == 2 and not hasattr(solver, "k")
    last = outcome.stderr.splitlines()[-2:]
    assert last == [f"error: this would not fit in memory: {remedy}", "the forecast"]


def test_the_demo_is_a_spectrum_of_the_shipped_gpt(solver, tmp_path):
    asked = []
    for command in (["demo"], ["spectrum", "curvax.models.gpt:make_problem", "--which", "BE"]):
        outcome = run(*command, "--out", tmp_path)
        facts = [line for line in outcome.stdout.splitlines() if not line.startswith("wanted")]
        config = json.loads((tmp_path / "config.json").read_text())
        options = {k: v for k, v in solver.options.items() if k != "callback"}
        asked.append((facts, options, config["options"]["target"], config["operator"]))
    assert asked[0] == asked[1]


def test_a_bug_is_not_hidden(solver, tmp_path):
    solver.outcome = AssertionError("a bug")
    assert isinstance(run("demo", "--out", tmp_path).exception, AssertionError)


# --- help, version, info, extras -----------------------------------------------------------------


def test_version():
    assert run("--version").stdout == "curvax 0.1.0\n"


def test_help_names_every_command_and_option():
    assert {"demo", "spectrum", "info", "--version"} <= set(run("--help").stdout.split())
    words = set(run("demo", "--help").stdout.split())
    assert words >= {"--out", "--tol", "--high", "--low", "--max-matvecs", "--seed"}
    assert words >= {"--certify", "--quiet", "0.001]", "10;", "5;", "curvax-demo]"}


def test_help_gives_flags_no_type_and_cuts_nothing_off():
    for arguments in ([], ["demo"], ["spectrum"], ["info"]):
        text = run(*arguments, "--help").stdout
        assert "<bool>" not in text and "..." not in text.replace("[ARGS]...", "")


def test_info_describes_the_build():
    outcome = run("info", CURVAX_IMPL="reference")
    facts = dict(line.split(maxsplit=1) for line in outcome.stdout.splitlines())
    assert not re.search(" $", outcome.stdout, re.MULTILINE)
    build = _native.build_info()
    assert facts["devices"].startswith("cpu") or facts["devices"].startswith("TFRT")
    assert facts["jax"].startswith("0.") and "jaxlib" in facts["jax"]
    assert facts["CURVAX_IMPL"] == "reference" and facts["fence"] == "not active"
    if build:
        assert build["active_target"] in outcome.stdout and "fence" in facts["kernels"]
        assert "switched off by CURVAX_IMPL" in facts["kernels"]


def test_info_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(_native.loading, "load", lambda platform: None)
    text = run("info").stdout
    assert "not compiled in" in text and "not active" in text and "FFI API" not in text
    assert re.search("CUDA module +absent", text) and "CURVAX_CUDA=ON" in text


def test_a_bad_environment_is_an_error_message():
    outcome = run("info", CURVAX_IMPL="quick")
    assert outcome.exit_code == 2 and "CURVAX_IMPL" in outcome.stderr
    assert "Traceback" not in outcome.output


def test_info_wraps_on_a_terminal_only():
    lines = run("info", COLUMNS="40", TTY_COMPATIBLE="1", NO_COLOR="1").stdout.splitlines()
    assert max(map(len, lines)) <= 40 + len("\x1b[0m")
    assert len(run("info", COLUMNS="40").stdout.splitlines()) < len(lines)


@native
def test_a_bad_target_is_an_exception_that_lists_those_to_be_had(monkeypatch):
    best = _native.build_info()["active_target"]
    monkeypatch.setenv("CURVAX_ISA", "v9")
    with pytest.raises(ValueError, match=rf"one of base\b.*\b{best}, which .* got 'v9'"):
        _native.build_info()
    assert os.environ["CURVAX_ISA"] == "v9"


@pytest.mark.parametrize("missing", ["typer", "rich.console"])
def test_without_the_extra_the_message_is_one_line(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import curvax.cli"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 1 and not outcome.stdout
    assert outcome.stderr == "the command line needs an extra: pip install 'curvax[cli]'\n"
