"""The Fisher operators against dense matrices from single samples' gradients in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tests.operators.fisher_problems import (
    CASES,
    CLASSES,
    EPS,
    assert_is,
    dense,
    labels_of,
    linear,
    logits,
    make_batch,
    mean_of_any,
    multiply,
    no_bias,
    ours,
    row_loss,
    small_params,  # noqa: F401 - the fixture
    truth,
    weights_of,
    without_bias,
)

import curvax as cx
from curvax import losses
from curvax.models import llama


@pytest.mark.thin(6)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "shape,linearize,microbatch_size",
    [((13,), True, None), ((6, 4), False, 4)],
    ids=["labels", "sequences"],
)
def test_empirical_is_the_sum_over_samples(case, shape, linearize, microbatch_size, params, rng):
    forward, loss = CASES[case]
    model = without_bias if forward is no_bias else logits
    batch = make_batch(rng, *shape, weights=isinstance(loss, type(ours) | type(linear)))
    options = {"linearize": linearize, "microbatch_size": microbatch_size}
    op = cx.fisher(forward, loss, params, batch, **options)
    assert_is(op, truth(model, params, batch))
    assert (op.residual_bytes > 0) == linearize
    assert (op.kind, op.num_samples, op.seed) == ("empirical", None, None)


@pytest.mark.parametrize(
    "case", [pytest.param("fused object", marks=pytest.mark.slow), "no logits"]
)
def test_empirical_with_options(case, params, rng):
    forward, loss = CASES[case]
    batch = make_batch(rng, 5, 3)
    loss = dataclasses.replace(loss, softcap=3.0, z_loss=0.05, label_smoothing=0.1)
    want = truth(logits, params, batch, cap=3.0, z_loss=0.05, smoothing=0.1)
    assert_is(cx.fisher(forward, loss, params, batch), want)


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", [pytest.param("any loss", marks=pytest.mark.slow), "no logits"])
def test_ragged_batches_subsets_and_blocks(case, params, rng):
    forward, loss = CASES[case]
    batches = [
        make_batch(rng, *shape, weights=loss is not mean_of_any)
        for shape in [(3, 3), (5, 3), (2, 4)]
    ]
    want = truth(logits, params, batches[:2])
    op = cx.fisher(forward, loss, params, batches, microbatch_size=3, num_batches=2)
    assert_is(op, want)
    part = cx.fisher(forward, loss, params, batches[:2], where=cx.match_names("w"))
    assert_is(part, want[-40:, -40:])
    block = op.unravel(jnp.asarray(rng.normal(size=(3, op.shape[0])), jnp.float32))
    got, flat = np.asarray(op.ravel(op @ block)), np.asarray(op.ravel(block), np.float64)
    assert np.abs(got - flat @ want).max() <= 32 * EPS * np.abs(flat @ want).max()


def test_parameters_in_bfloat16_and_float64(params, rng):
    batch = make_batch(rng, 5, 3)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for forward, loss in (CASES["fused object"], CASES["no logits"]):
        assert_is(cx.fisher(forward, loss, narrow, batch), truth(logits, narrow, batch))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, batch["x"]))
        op = cx.fisher(logits, ours, wide[0], {**batch, "x": wide[1]})
        want = truth(logits, params, batch)
        assert np.abs(dense(op) - want).max() <= 1e-13 * np.abs(want).max()


def test_one_label_per_sample_is_the_mean_of_outer_products(params, rng):
    """What other packages compute."""
    batch = make_batch(rng, 9, weights=False, masked=False)

    def plain_mean(outputs, batch):
        return mean_of_any(outputs, batch)[0]

    op = cx.fisher(logits, plain_mean, params, batch)
    flat, unravel = ravel_pytree(params)

    def one(flat, x, y):
        return plain_mean(logits(unravel(flat), {"x": x[None]}), {"labels": y[None]})

    g = np.asarray(jax.vmap(jax.grad(one), (None, 0, 0))(flat, batch["x"], batch["labels"]))
    want = g.T.astype(np.float64) @ g / 9
    assert np.abs(dense(op) - want).max() <= 16 * EPS * np.abs(want).max()


def test_shared_scalars(params, rng):
    """A temperature among the outputs, and one in the batch: every sample has both."""
    batch = {**make_batch(rng, 6, weights=False, masked=False), "scale": jnp.float32(0.7)}

    def forward(params, batch):
        return {"z": without_bias(params, batch), "t": params["b"][0]}

    def loss(outputs, batch):
        z = outputs["z"] * batch["scale"].astype(outputs["z"].dtype) * jnp.exp(outputs["t"])
        return mean_of_any(z, batch)

    def model(params, batch):
        scale = jnp.asarray(np.float64(np.float32(0.7)))
        return without_bias(params, batch) * scale * jnp.exp(params["b"][0])

    op = cx.fisher(forward, loss, params, batch)
    assert_is(op, truth(model, params, batch))


def test_mean_squared_error(params, rng):
    x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=(6, CLASSES)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.1, 2, 6), jnp.float32)
    batch = {"x": x, "labels": targets, "weights": weights}

    def total(outputs, batch):
        """Labels' weights count twice in a loss of one's own: here they are equal."""
        return jnp.mean((outputs - batch["labels"]) ** 2), jnp.float32(outputs.size)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (params, batch))
        flat, unravel = ravel_pytree(wide[0])

        def jacobian(x):
            return jax.jacobian(lambda f: logits(unravel(f), {"x": x[None]})[0])(flat)

        jacobians = np.asarray(jax.vmap(jacobian)(wide[1]["x"]))
        residuals = np.asarray(logits(*wide) - wide[1]["labels"])
        w = np.asarray(wide[1]["weights"])
    gradients = 2 * np.einsum("iv,ivn->in", residuals, jacobians)
    loss = losses.MeanSquaredError(labels_of, weights_of)
    op = cx.fisher(logits, loss, params, batch, microbatch_size=4)
    assert_is(op, np.einsum("i,in,im->nm", w, gradients, gradients) / (CLASSES * w.sum()))
    equal = np.einsum("in,im->nm", gradients, gradients) / (CLASSES * 6)
    assert_is(cx.fisher(logits, losses.MeanSquaredError(labels_of), params, batch), equal)
    assert_is(cx.fisher(logits, total, params, batch), equal)
    exact = cx.fisher(logits, loss, params, batch, kind="exact")
    want = 2 * np.einsum("i,ivn,ivm->nm", w, jacobians, jacobians) / (CLASSES * w.sum())
    assert_is(exact, want)
    np.testing.assert_array_equal(dense(exact), dense(cx.ggn(logits, loss, params, batch)))


@pytest.mark.parametrize(
    "case", [pytest.param("fused object", marks=pytest.mark.slow), "no logits"]
)
def test_exact_is_the_gauss_newton_matrix(case, params, rng):
    """Of the likelihood: a penalty is no part of it."""
    forward, loss = CASES[case]
    batch = make_batch(rng, 5, 3)
    plain = dataclasses.replace(loss, softcap=3.0, label_smoothing=0.1)
    penalised = dataclasses.replace(plain, z_loss=0.05)
    want = dense(cx.ggn(forward, plain, params, batch))
    for given in (plain, penalised):
        exact = dense(cx.fisher(forward, given, params, batch, kind="exact"))
        assert np.abs(exact - want).max() <= 4 * EPS * np.abs(want).max()
    other = dense(cx.ggn(forward, penalised, params, batch))
    assert np.abs(other - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.slow
def test_exact_of_a_transformer():
    """The head is the transposed embedding, so that it is a parameter twice."""
    rest = {"context": 8, "norm_eps": 1e-5, "rope_theta": 100.0}
    config = llama.Config(layers=1, width=8, heads=2, kv_heads=1, hidden=12, vocab=31, **rest)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params = llama.init(jax.random.key(0), config)
        tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 31)

        def forward(params, tokens):
            return llama.outputs(params, tokens[:, :-1], config)

        loss = losses.LinearCrossEntropy(lambda tokens: tokens[:, 1:], z_loss=0.1)
        exact = cx.fisher(forward, loss, params, tokens, kind="exact", linearize=False)
        plain = dataclasses.replace(loss, z_loss=0.0)
        want = cx.ggn(forward, plain, params, tokens, linearize=False)
        v = jax.random.normal(jax.random.key(2), (1, want.shape[0]))
        got, want = (np.asarray(multiply(op, v)) for op in (exact, want))
    assert np.abs(got - want).max() <= 4 * EPS * np.abs(want).max()


def test_exact_is_the_expectation_over_labels(params, rng):
    """All labels in turn, weighted by their probabilities."""
    batch = make_batch(rng, 3, weights=False, masked=False)
    exact = dense(cx.fisher(logits, ours, params, batch, kind="exact"))
    p = np.asarray(jax.nn.softmax(logits(params, batch)), np.float64)
    every = {
        "x": jnp.repeat(batch["x"], CLASSES, axis=0),
        "labels": np.tile(np.arange(CLASSES, dtype=np.int32), 3),
        "weights": jnp.asarray(p.ravel(), jnp.float32),
    }
    assert np.abs(exact - truth(logits, params, every)).max() <= 16 * EPS * np.abs(exact).max()


@pytest.mark.slow
def test_mlp_of_low_rank(rng):
    """Rank 8 and ten eigenvalues wanted: the missing ones are zeros, at any scale."""
    sizes = [(20, 32), (32,), (32, 3), (3,)]
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in sizes]
    x = jnp.asarray(rng.normal(size=(8, 20)), jnp.float32)
    batch = {"x": x, "labels": rng.integers(0, 3, 8).astype(np.int32)}

    def mlp(params, batch):
        w1, b1, w2, b2 = params
        return jnp.tanh(batch["x"] @ w1 + b1[None]) @ w2 + b2[None]

    op = cx.fisher(mlp, losses.SoftmaxCrossEntropy(labels_of), params, batch)
    assert op.shape == (771, 771)
    flat, unravel = ravel_pytree(params)

    def one(flat, x, y):
        z = mlp(unravel(flat), {"x": x[None]})[0]
        return row_loss(z, y)

    g = jax.vmap(jax.grad(one), (None, 0, 0))(flat, x, batch["labels"])
    g = np.asarray(g, np.float64)
    want = np.append(np.linalg.eigvalsh(g @ g.T / 8)[::-1], [0, 0])
    for scale in (1.0, 1e-14):
        result = cx.eigsh(scale * op, 10, seed=0)
        error = np.abs(np.asarray(result.eigenvalues, np.float64) / scale - want)
        assert error.max() <= 32 * EPS * want[0]
        assert result.all_converged


def product_memory(op):
    block = jnp.zeros((1, op.shape[0]), op.dtype)
    compiled = jax.jit(lambda op, block: op.product(block)).lower(op, block).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "case",
    [pytest.param("any loss", marks=pytest.mark.slow), "fused object", "no logits", "mc"],
)
def test_memory_does_not_grow_with_the_samples(case, rng):
    forward, loss = {**CASES, "mc": (logits, ours)}[case]
    width = 512
    params = {
        "w": jnp.zeros((5, width), jnp.float32),
        "h": jnp.zeros((CLASSES, width), jnp.float32),
        "b": jnp.zeros(CLASSES, jnp.float32),
    }
    options = {"kind": "mc", "seed": 0} if case == "mc" else {}
    n = sum(leaf.size for leaf in jax.tree.leaves(params))

    def memory(samples):
        batch = make_batch(rng, samples, weights=False)
        options_ = {**options, "microbatch_size": 16, "linearize": False}
        return product_memory(cx.fisher(forward, loss, params, batch, **options_))

    few, many = memory(64), memory(1024)
    # But for the share of each microbatch, which is a number.
    assert many - few <= 4 * (1024 - 64) // 16
    assert many <= 4 * 1024 * n / 50

    def by_gradients(params, batch, v):
        def one(params, x, y):
            return mean_of_any(logits(params, {"x": x[None]}), {"labels": y[None]})[0]

        g = jax.vmap(jax.grad(one), (None, 0, 0))(params, batch["x"], batch["labels"])
        g = jnp.concatenate([leaf.reshape(1024, -1) for leaf in jax.tree.leaves(g)], axis=1)
        return (g @ v) @ g

    batch = {k: jnp.asarray(v) for k, v in make_batch(rng, 1024, weights=False).items()}
    arguments = (params, batch, jnp.zeros(n))
    analysis = jax.jit(by_gradients).lower(*arguments).compile().memory_analysis()
    assert many <= analysis.temp_size_in_bytes / 50


def test_bad_arguments(params, rng):
    batch = make_batch(rng, 5)

    def make(loss=ours, forward=logits, batch=batch, **options):
        return cx.fisher(forward, loss, params, batch, **options)

    with pytest.raises(ValueError, match=r"kind must be one of \('empirical', 'exact', 'mc'\)"):
        make(kind="true")
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        make(kind="mc", num_samples=0)
    with pytest.raises(TypeError, match=r"num_samples must be an integer, got 2\.0"):
        make(kind="mc", num_samples=2.0)
    with pytest.raises(TypeError, match="seed must be an integer, got 'a'"):
        make(kind="mc", seed="a")
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        make(kind="mc", seed=-1)
    for kind in ("empirical", "exact"):
        with pytest.raises(ValueError, match=f"seed is for kind='mc' only.*'{kind}'"):
            make(kind=kind, seed=0)
        with pytest.raises(ValueError, match=f"num_samples is for kind='mc' only.*'{kind}'"):
            make(kind=kind, num_samples=2)
    with pytest.raises(TypeError, match=r"'exact' needs a loss with a method fisher_product: .*"):
        make(mean_of_any, kind="exact")
    with pytest.raises(TypeError, match=r"'mc' needs .* fisher_product or sample: .*'empirical'"):
        make(mean_of_any, kind="mc")
    with pytest.raises(TypeError, match=r"forward must be callable as forward\(params, batch\)"):
        make(forward=3)
    with pytest.raises(TypeError, match=r"loss must be callable as loss\(outputs, batch\)"):
        make(loss=None)


def test_outputs_without_samples(params, rng):
    batch = make_batch(rng, 4, 3, weights=False)

    def flat(params, batch):
        return logits(params, batch).reshape(-1, CLASSES)

    def flat_labels(batch):
        return batch["labels"].reshape(-1)

    own = losses.SoftmaxCrossEntropy(flat_labels)
    with pytest.raises(ValueError, match=r"logits must have the samples on a leading axis.*\[4\]"):
        cx.fisher(flat, own, params, batch)
    cx.fisher(flat, own, params, batch, kind="exact")

    def any_loss(outputs, batch):
        return mean_of_any(outputs, {"labels": flat_labels(batch)})

    with pytest.raises(ValueError, match=r"outputs must have the samples on its leading axis, 4"):
        cx.fisher(flat, any_loss, params, batch)
    with pytest.raises(ValueError, match=r"leaf '1' of outputs must .* 4 as leaf 'labels'"):
        cx.fisher(no_bias, lambda o, b: mean_of_any(o[0] @ o[1].T, b), params, batch)
    with pytest.raises(ValueError, match=r"outputs must have an axis of samples, got .*\(\)"):
        cx.fisher(lambda p, b: mean_of_any(logits(p, b), b)[0], lambda o, b: o, params, batch)
    extra = {**batch, "classes": jnp.zeros(7)}
    with pytest.raises(ValueError, match=r"batch 0 has \[4, 7\]"):
        cx.fisher(logits, ours, params, extra, kind="mc")

    class Wrong(losses.SoftmaxCrossEntropy):
        def fisher_product(self, outputs, batch, u, kind, keys):
            return u[..., :2]

    for kind in ("empirical", "mc"):
        with pytest.raises(TypeError, match="fisher_product must return the structure, shapes"):
            cx.fisher(logits, Wrong(labels_of), params, batch, kind=kind)
