"""The Llama decoder against loops in float64 NumPy, and its derivatives against differences."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from curvax.models import llama

SIZES = {
    "vocab": 40,
    "width": 48,
    "layers": 2,
    "heads": 6,
    "kv_heads": 2,
    "hidden": 80,
    "context": 16,
    "norm_eps": 1e-5,
    "rope_theta": 100.0,
}


@pytest.fixture(autouse=True)
def default_promotion():
    """The settings that users have, in place of the tests' strict ones."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def config_of(**changes):
    return llama.Config(**SIZES | changes)


def random_tokens(length=11, seed=3):
    return np.random.default_rng(seed).integers(0, SIZES["vocab"], (2, length)).astype(np.int32)


def random_params(config):
    """Larger than `init` draws, so that attention is far from uniform, and no norm is one."""
    shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), config))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return (mean + 0.15 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


logits_of = jax.jit(llama.logits, static_argnames="config")


def cast(params, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


# --- the truth -----------------------------------------------------------------------------------


def np_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def np_rope(x, theta):
    """Feature pairs (i, i + head / 2) as complex numbers, turned by position times frequency."""
    length, head = x.shape
    z = x[:, : head // 2] + 1j * x[:, head // 2 :]
    for position in range(length):
        for i in range(head // 2):
            z[position, i] *= np.exp(1j * position / theta ** (2 * i / head))
    return np.concatenate([z.real, z.imag], axis=1)


def np_attention(x, q, k, v, config):
    """One sequence `(T, D)`; query head h reads key head h // (heads / kv_heads)."""
    length, head = len(x), config.width // config.heads
    columns = []
    for h in range(config.heads):
        own = slice(h * head, (h + 1) * head)
        served = h // (config.heads // config.kv_heads)
        other = slice(served * head, (served + 1) * head)
        queries = np_rope(x @ q[:, own], config.rope_theta)
        keys = np_rope(x @ k[:, other], config.rope_theta)
        values = x @ v[:, other]
        out = np.zeros((length, head))
        for t in range(length):
            scores = np.exp(queries[t] @ keys[: t + 1].T / np.sqrt(head))
            out[t] = scores / scores.sum() @ values[: t + 1]
        columns.append(out)
    return np.concatenate(columns, axis=1)


def np_logits(params, tokens, config):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = []
    for sequence in tokens:
        x = params["embed"][sequence]
        for layer in range(config.layers):
            p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
            y, attn, mlp = np_norm(x, p["norm1"], config.norm_eps), p["attn"], p["mlp"]
            x = x + np_attention(y, attn["q"], attn["k"], attn["v"], config) @ attn["out"]
            y = np_norm(x, p["norm2"], config.norm_eps)
            gate = y @ mlp["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"])) @ mlp["down"]
        rows.append(np_norm(x, params["norm"], config.norm_eps) @ params["embed"].T)
    return np.stack(rows)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_logits_are_those_of_the_loops(kv_heads, dtype):
    config, tokens = config_of(kv_heads=kv_heads), random_tokens()
    params = random_params(config)
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        ours = logits_of(cast(params, dtype), jnp.asarray(tokens), config)
    truth = np_logits(params, tokens, config)
    assert (ours.shape, ours.dtype) == ((2, 11, 40), dtype)
    np.testing.assert_allclose(
        ours, truth, rtol=0, atol=50 * np.finfo(dtype).eps * abs(truth).max()
    )


def test_hidden_states_are_normed_and_head_is_tied():
    config, tokens = config_of(), jnp.asarray(random_tokens())
    params = cast(random_params(config), jnp.float32)
    states = llama.hidden(params, tokens, config)
    squares = jnp.mean((states / params["norm"]) ** 2, axis=-1)
    np.testing.assert_allclose(squares, 1, atol=1e-3)
    expected = logits_of(params, tokens, config)
    np.testing.assert_allclose(states @ params["embed"].T, expected, atol=1e-4)


def test_later_tokens_change_nothing_earlier():
    config, tokens = config_of(), random_tokens()
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % config.vocab
    params = cast(random_params(config), jnp.float32)
    before, after = (logits_of(params, jnp.asarray(t), config) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (jnp.abs(before - after).max(axis=-1)[:, 6:] > 1e-3).all()


def test_initial_parameters():
    config = config_of()
    params = llama.init(jax.random.key(0), config)
    head = 8
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "embed": (40, 48),
        "layers": {
            "norm1": (2, 48),
            "attn": {"q": (2, 48, 48), "k": (2, 48, 2 * head), "v": (2, 48, 2 * head)}
            | {"out": (2, 48, 48)},
            "norm2": (2, 48),
            "mlp": {"gate": (2, 48, 80), "up": (2, 48, 80), "down": (2, 80, 48)},
        },
        "norm": (48,),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    attn = params["layers"]["attn"]
    assert float(attn["q"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(attn["out"].std()) == pytest.approx(0.01, rel=0.05)
    # Nothing is known yet.
    loss = cross_entropy(params, jnp.asarray(random_tokens()), config)
    assert float(loss) == pytest.approx(np.log(40), abs=0.05)


# --- derivatives ---------------------------------------------------------------------------------


def cross_entropy(params, tokens, config):
    logits = logits_of(params, tokens[:, :-1], config)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


@jax.enable_x64(True)
def test_hessian_product_forward_over_reverse():
    config, tokens = config_of(), jnp.asarray(random_tokens())
    x, unravel = ravel_pytree(cast(random_params(config), "float64"))
    v = jnp.asarray(np.random.default_rng(4).standard_normal(x.size))
    v, h = v / jnp.linalg.norm(v), 1e-4
    gradient = jax.grad(lambda x: cross_entropy(unravel(x), tokens, config))
    # One compilation of both, and a quick one: it takes nearly all the time of the test.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    both = jax.jit(lambda x: jax.jvp(gradient, (x,), (v,)), compiler_options=quick)
    # Fourth order in h.
    near = both(x + h * v)[0] - both(x - h * v)[0]
    far = both(x + 2 * h * v)[0] - both(x - 2 * h * v)[0]
    differences, product = (8 * near - far) / (12 * h), both(x)[1]
    error = jnp.linalg.norm(product - differences)
    assert error <= 1e-9 * jnp.linalg.norm(differences)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_heads": 4}, "kv_heads must divide heads = 6, got 4; choose"),
        ({"width": 54}, r"width must be a multiple of 2 \* heads = 12, .*got 54; change"),
        ({"layers": 0}, "layers must be positive, got 0; give"),
        ({"norm_eps": float("nan")}, "norm_eps must be positive, got nan; give"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (np.zeros((2, 3), np.float32), r"tokens must be integers .*got float32 of shape \(2, 3\)"),
        (np.zeros(3, np.int32), r"tokens must be .*got int32 of shape \(3,\); add a batch axis"),
        (np.zeros((1, 17), np.int32), "config.context = 16 columns, got 17; shorten"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    config = config_of()
    with pytest.raises(ValueError, match=message):
        llama.logits(llama.init(jax.random.key(0), config), jnp.asarray(tokens), config)
