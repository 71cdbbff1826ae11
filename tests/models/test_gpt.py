"""The shipped GPT, and the script that made it."""

import importlib.resources
import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from curvax.models import gpt

ROOT = Path(__file__).parents[2]
DATA = importlib.resources.files("curvax.models")


@pytest.fixture(autouse=True)
def default_promotion():
    """The settings that users have, in place of the tests' strict ones."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def loaded():
    return gpt.load()


def test_params_have_the_structure_of_init(loaded):
    params, _ = loaded
    expected = jax.eval_shape(lambda: gpt.init(jax.random.key(0)))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)


def test_params_are_the_stored_float16_numbers(loaded):
    params, _ = loaded
    with (DATA / "gpt.npz").open("rb") as stream, np.load(stream) as stored:
        flat = stored["parameters"]
    assert flat.dtype == np.float16
    np.testing.assert_array_equal(ravel_pytree(params)[0], flat.astype(np.float32))


def test_batch_is_english_bytes(loaded):
    _, batch = loaded
    assert (batch.shape, batch.dtype) == ((16, 65), np.uint8)
    text = np.asarray(batch).tobytes().decode(errors="replace")
    assert text.count(" the ") >= 3


def test_loss_is_the_recorded_one(loaded):
    facts = json.loads((DATA / "gpt.json").read_text())
    assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(loaded[0]))
    loss = float(jax.jit(gpt.loss)(*loaded))
    # Far below log(256) = 5.5, the loss of a model that knows nothing.
    assert loss == pytest.approx(facts["loss_on_shipped_batch"], abs=1e-4)


def test_the_problem_has_the_loss_of_the_plain_form(loaded):
    model, batch = gpt.make_problem()
    mean, weight = jax.jit(model.objective)(model.params, batch)
    assert float(mean) == pytest.approx(float(jax.jit(gpt.loss)(*loaded)), rel=1e-6)
    assert float(weight) == 16 * 64


def test_loading_draws_no_random_numbers(monkeypatch):
    def draw(*args, **kwargs):
        assert isinstance(args[0], jax.core.Tracer), "drew numbers"
        return normal(*args, **kwargs)

    normal = jax.random.normal
    monkeypatch.setattr(jax.random, "normal", draw)
    gpt.load()


def test_data_ships_and_is_small():
    names = {entry.name: entry for entry in DATA.iterdir()}
    assert {"gpt.npz", "gpt.json", "gpt.py"} <= names.keys()
    assert len(names["gpt.npz"].read_bytes()) <= 2 * 2**20


@pytest.mark.slow
def test_training_script_writes_what_load_reads(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optax")
    script = str(ROOT / "examples" / "train_demo_gpt.py")
    monkeypatch.setattr(sys, "argv", [script, "--steps", "2", "--out", str(tmp_path)])
    runpy.run_path(script, run_name="__main__")
    assert "step    1" in capsys.readouterr().out
    with np.load(tmp_path / "gpt.npz") as made:
        assert made["parameters"].shape == (862464,) and made["parameters"].dtype == np.float16
        assert made["batch"].shape == (16, 65) and made["batch"].dtype == np.uint8
    facts = json.loads((tmp_path / "gpt.json").read_text())
    assert facts["parameters"] == 862464 and facts["steps"] == 2
