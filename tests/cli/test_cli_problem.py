"""The command line on a problem of one's own."""

import importlib.metadata
import json

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

import curvax as cx
from curvax import cli
from curvax.cli.options import read_size

MODULE = '''
import numpy as np, jax.numpy as jnp, curvax as cx

rng = np.random.default_rng(0)
PARAMS = {"w1": rng.standard_normal((5, 7)), "w2": rng.standard_normal((7, 3))}
PARAMS = {name: jnp.asarray(w, jnp.float32) for name, w in PARAMS.items()}
X, Y = rng.standard_normal((30, 5)).astype("float32"), rng.integers(0, 3, 30)


def forward(params, batch):
    return jnp.tanh(batch[0] @ params["w1"]) @ params["w2"]


def make_problem():
    loss = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])
    return cx.Model(PARAMS, forward, loss), (X, Y)


class Module:
    __module__ = "torch.nn.modules.module"


def module():
    return type("Net", (Module,), {})(), (X, Y)


def wide():
    return make_problem()[0], (X, Y + 2**32)


def nothing():
    return None


def three():
    return make_problem() + (1,)


def broken():
    raise RuntimeError("no data here")


def sized(rows, scale=1.0, *, name="all"):
    """The first rows of the problem.

    And more.
    """
    assert (scale, name) == (0.5, "first")
    model, (x, y) = make_problem()
    return model, (x[:rows], y[:rows])


def misused():
    return cx.Model(PARAMS, None, None), X


def infinite():
    model, (x, y) = make_problem()
    return model, (x * float("inf"), y)
'''


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """The file, in the current folder."""
    path = tmp_path / "own_problem_of_tests.py"
    path.write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    return path


def run(*arguments):
    environment = {"COLUMNS": "80", "FORCE_COLOR": None, "NO_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env=environment)


def operator(name, **options):
    """The same without the command line."""
    space = {}
    exec(MODULE, space)
    model, batch = space["make_problem"]()
    return getattr(cx, name)(model, batch, **options)


def dense(op):
    return np.asarray(op.product(np.eye(op.shape[0], dtype=np.float32)), np.float64)


TARGET = "own_problem_of_tests:make_problem"
SIZED = "own_problem_of_tests:sized"


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "arguments,name,options",
    [
        ((), "hessian", {}),
        (("--operator", "ggn"), "ggn", {}),
        (("--operator", "fisher"), "fisher", {"kind": "empirical"}),
        (("--operator", "fisher", "--kind", "mc"), "fisher", {"kind": "mc", "seed": 0}),
        (("--where", "w2", "--microbatch-size", "7"), "hessian", {"where": cx.match_names("w2")}),
    ],
)
def test_spectrum(problem, arguments, name, options):
    out = run("spectrum", TARGET, "-k", 4, "--which", "BE", *arguments, "--out", "run")
    assert out.exit_code == 0, out.output
    values = np.linalg.eigvalsh(dense(operator(name, **options)))
    found = json.loads((problem.parent / "run" / "spectrum.json").read_text())
    assert all(found["converged"])
    wanted = np.r_[values[::-1][:2], values[1::-1]]
    np.testing.assert_allclose(found["eigenvalues"], wanted, atol=1e-3 * abs(values).max())
    assert "all 4 eigenpairs converged" in out.stdout and TARGET in out.stdout


def test_the_directory_holds_all_that_a_run_depends_on(problem):
    out = run("spectrum", f"{problem.name}:make_problem", "-k", 2, "--operator", "ggn")
    assert out.exit_code == 0, out.output
    folder = problem.parent / "curvax-spectrum"
    names = ("spectrum.npz", "spectrum.json", "spectrum.txt", "spectrum.png", "config.json")
    assert {path.name for path in folder.iterdir()} == set(names)
    assert imread(folder / "spectrum.png").std() > 0.01
    result = cx.load(folder / "spectrum.npz")
    assert (folder / "spectrum.txt").read_text() == f"{result}\n"
    config = json.loads((folder / "config.json").read_text())
    assert config["subcommand"] == "spectrum"
    options = config["options"]
    assert options["target"] == f"{problem.name}:make_problem" and options["tol"] == 1e-3
    assert options["count"] == 2 and options["which"] == "LM" and options["seed"] == 0
    assert config["operator"]["parameters"] == 56 and config["operator"]["leaves"] == ["w1", "w2"]
    assert config["operator"]["loss"] == pytest.approx(float(operator("ggn").loss))
    assert config["versions"]["jax"] == importlib.metadata.version("jax")
    # The default for a problem of one's own.
    np.testing.assert_allclose(result.tol_effective, 1e-3)


def test_the_parameters_of_a_problem(problem):
    given = ("--set", "rows=9", "--set", "scale=0.5", "--set", "name=first")
    out = run("plan", SIZED, *given)
    assert out.exit_code == 0, out.output
    facts = dict(line.split(maxsplit=1) for line in out.stdout.splitlines()[:6])
    assert facts["problem"] == f"{SIZED}, rows=9, scale=0.5, name='first'"
    assert facts["about"] == "The first rows of the problem."
    space = {}
    exec(MODULE, space)
    model, (x, y) = space["make_problem"]()
    loss, _ = model.objective(model.params, (x[:9], y[:9]))
    assert float(facts["loss"]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    "target, located",
    [("own_problem_of_tests:misused", True), ("curvax.models.llama:make_problem", False)],
)
def test_errors_in_a_problem_are_located_where_it_is_the_users_own(target, located, problem, capfd):
    out = run("plan", target, *([] if located else ["--set", "width=12"]))
    assert out.exit_code == 2
    assert ("Traceback" in out.stderr) == ("own_problem_of_tests.py" in out.stderr) == located
    assert f"error: {target} raised" in out.stderr


def test_trace(problem):
    out = run("trace", TARGET, "--num-matvecs", 56, "--out", "run")
    assert out.exit_code == 0, out.output
    result = cx.load(problem.parent / "run" / "trace.npz")
    np.testing.assert_allclose(result.estimate, np.trace(dense(operator("hessian"))), rtol=1e-4)
    names = {path.name for path in (problem.parent / "run").iterdir()}
    assert names == {"trace.npz", "trace.json", "trace.txt", "trace.png", "config.json"}


def test_a_trace_that_stays_above_its_aim_exits_with_3(problem):
    aim = ("--until", 1e-6, "--num-matvecs", 10, "--max-matvecs", 20)
    out = run("trace", TARGET, *aim, "--method", "hutchinson")
    assert out.exit_code == 3 and "above until=1e-06" in out.stdout
    assert run("trace", TARGET, "--until", 1e3, "--num-matvecs", 10).exit_code == 0


def test_diagonal(problem):
    out = run("diagonal", TARGET, "--operator", "ggn", "--out", "run")
    assert out.exit_code == 0, out.output
    result = cx.load(problem.parent / "run" / "diagonal.npz")
    op = operator("ggn")
    np.testing.assert_allclose(
        np.concatenate([np.ravel(leaf) for _, leaf in sorted(result.estimate.items())]),
        np.diag(dense(op)),
        atol=1e-5,
    )


def test_density(problem):
    out = run("density", TARGET, "--num-runs", 2, "--num-steps", 12, "--out", "run")
    assert out.exit_code == 0, out.output
    result = cx.load(problem.parent / "run" / "density.npz")
    values = np.linalg.eigvalsh(dense(operator("hessian")))
    assert result.nodes.max() == pytest.approx(values[-1], rel=1e-2)
    assert imread(problem.parent / "run" / "density.png").std() > 0.01


def test_plan(problem):
    out = run("plan", TARGET, "-k", 3)
    assert out.exit_code == 0 and "fits" in out.stdout and "56 parameters" in out.stdout
    out = run("plan", TARGET, "-k", 3, "--limit", "100B")
    assert out.exit_code == 2 and "DOES NOT FIT" in out.stdout
    assert not list(problem.parent.glob("curvax-*"))


@pytest.mark.parametrize(
    "size, held",
    [
        ("9GB", 9 * 10**9),
        ("9gb", 9 * 10**9),
        ("9 GB", 9 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("500MB", 5 * 10**8),
        ("8 Gi", 2**33),
        ("9G", 9 * 10**9),
        ("64kb", 64_000),
        ("2TiB", 2**41),
        ("100B", 100),
        ("100 b", 100),
        ("9e9", 9 * 10**9),
        ("512MB", 512 * 10**6),
        ("7000000000", 7 * 10**9),
    ],
)
def test_sizes_of_memory(size, held):
    assert read_size(size) == held


@pytest.mark.parametrize("command", ["plan", "spectrum"])
@pytest.mark.parametrize(
    "size",
    ["0", "-1", "nan", "inf", "9XB", "GB", "9iB", "9 9GB", "1.2.3GB", "0MB", "1e30GB", "7", "1e30"],
)
def test_sizes_that_are_none(command, size, problem):
    out = run(command, TARGET, "--limit", size)
    assert out.exit_code == 2
    text = " ".join(out.output.replace("│", " ").split())
    assert "expected a size such as 9GB, 500MB, 8GiB or 9e9 (bytes)" in text
    assert f"got {size!r}" in text and ("did you mean 7GB?" in text) == (size == "7")


@pytest.mark.parametrize("command", ["spectrum", "trace", "diagonal", "density", "plan"])
def test_quiet_prints_nothing(command, problem):
    short = {"density": ("--num-runs", 2, "--num-steps", 5)}.get(command, ())
    out = run(command, TARGET, *short, "--quiet")
    assert out.exit_code == 0 and out.output == ""


def test_a_solve_that_does_not_converge_exits_with_3(problem):
    out = run("spectrum", TARGET, "-k", 3, "--tol", 1e-6, "--max-matvecs", 4)
    assert out.exit_code == 3 and "not converged" in out.stdout
    assert (problem.parent / "curvax-spectrum" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((), "give either MODULE:FUNCTION or --model"),
        ((TARGET, "--model", "smollm2"), "give either MODULE:FUNCTION or --model"),
        (("own_problem_of_tests",), "expected MODULE:FUNCTION, as my_module:make_problem"),
        (("own_problem_of_tests:",), "expected MODULE:FUNCTION"),
        (("no_such_module_here:f",), "no module 'no_such_module_here' here"),
        (("own_problem_of_test:f",), "'own_problem_of_test'; did you mean own_problem_of_tests?"),
        (("curvax.modles.gpt:f",), "no module 'curvax.modles'; 'curvax' has models"),
        (("curvax.models.gtp:f",), "no module 'curvax.models.gtp'; 'curvax.models' has gpt"),
        (("curvax.models.gpt:problem",), "it has init, forward, loss, load, make_problem"),
        ((TARGET, "--set", "rows"), "expected NAME=VALUE, as tokens=64, got 'rows'"),
        ((TARGET, "--set", "rows=3"), f"{TARGET} has no parameter 'rows'; it has none"),
        ((TARGET, "--set", "a=3", "--set", "a=4"), "a is given more than once"),
        ((SIZED, "--set", "row=3"), "no parameter 'row'; it has rows, scale, name"),
        ((SIZED,), "needs a value: --set rows=VALUE"),
        (("none.py:f",), "no such file: 'none.py'"),
        (("own_problem_of_tests:f",), "has no function 'f'; it has forward, make_problem"),
        (("own_problem_of_tests:PARAMS",), "has no function 'PARAMS'"),
        (("own_problem_of_tests:nothing",), "must return (model, batches)"),
        (("own_problem_of_tests:three",), "got tuple of Model, tuple, int"),
        (("own_problem_of_tests:module",), "make a model of it by curvax.adapters.torch.from_mod"),
        (("own_problem_of_tests:wide",), "leaf '1' of batch 0 must fit in int32"),
        (("own_problem_of_tests:broken",), "raised RuntimeError: no data here"),
        (("own_problem_of_tests:infinite",), "the loss is nan on batch 0"),
        ((TARGET, "--kind", "mc"), "only with --operator fisher"),
        ((TARGET, "--where", "v*"), "'v*' matches no name"),
        ((TARGET, "-k", 57), "k must be between 1 and n = 56, got 57"),
        ((TARGET, "--tol", 2), "expected a number between 0 and 1"),
    ],
)
def test_bad_input_exits_with_2(arguments, message, problem):
    out = run("spectrum", *arguments)
    assert out.exit_code == 2
    assert message in " ".join(out.output.replace("\n│", " ").split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("spectrm",), "no command 'spectrm'; did you mean spectrum?"),
        (("eigenvalues",), "did you mean spectrum or demo or plan or trace or diagonal or density"),
        (
            ("trace", TARGET, "--num-matvec", 9),
            "(Possible options: --max-matvecs, --num-matvecs)",
        ),
        (("plan", TARGET, "-j", 9), "-j (Possible options: --count, --kind, --limit"),
        (("plan", TARGET, "--tol", 0.1, "--tol", 0.2), "--tol: given more than once"),
        (("plan", TARGET, "-k", 3, "--count", 4), "--count / -k: given more than once"),
        (("trace", TARGET, "--method", "hutch"), "'hutchinson', 'hutch++', 'xtrace', 'xnystrace'"),
    ],
)
def test_what_is_misspelt_or_given_twice_is_answered_by_what_there_is(arguments, message, problem):
    out = run(*arguments)
    assert out.exit_code == 2
    assert message in " ".join(out.stderr.split())


@pytest.mark.parametrize("command", ["spectrum", "trace", "diagonal", "density", "plan"])
def test_help_names_every_option(command):
    text = run(command, "--help").stdout
    assert "MODULE:FUNCTION" in text and "exit status" in " ".join(text.split())
    for option in (
        "--set",
        "--model",
        "--operator",
        "--kind",
        "--where",
        "--microbatch-size",
        "--quiet",
    ):
        assert option in text
