"""The Fisher matrix of single long samples, by the gradients that are kept of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.operators.fisher_problems import (
    CASES,
    EPS,
    assert_is,
    dense,
    make_batch,
    no_logits,
    ours,
    small_params,  # noqa: F401 - the fixture
    truth,
    without_bias,
)

import curvax as cx
from curvax.operators.checked_product import compiled_product

# Of each sample the activations are longer than the 139 parameters.
SAMPLES, LENGTH = 4, 40


def _gradients_kept(op, samples=SAMPLES):
    return op.residual_bytes == samples * op.shape[0] * op.dtype.itemsize


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, marks=pytest.mark.slow)
        if x in ("fused function", "no logits, no bias")
        else x
        for x in CASES
    ],
)
def test_is_the_sum_over_samples(case, params, rng):
    """Masked labels, one sample without any, and weights, where the loss knows of them."""
    forward, loss = CASES[case]
    batch = make_batch(rng, SAMPLES, LENGTH, weights=loss is ours or forward is no_logits)
    if case == "no logits, no bias":
        params = {**params, "b": jnp.zeros_like(params["b"])}
        batch = make_batch(rng, SAMPLES, LENGTH)
    op = cx.fisher(forward, loss, params, batch, microbatch_size=1)
    assert _gradients_kept(op)
    want = truth(CASES["any loss"][0], params, batch)
    if case == "no logits, no bias":
        want = truth(without_bias, params, batch)
    assert_is(op, want)


@pytest.mark.parametrize("scale", [1e-6, pytest.param(1e6, marks=pytest.mark.slow)])
def test_scales(scale, params, rng):
    """Entries of the size of the square: the root of a product is taken without underflow."""
    x = jnp.asarray(rng.normal(size=(SAMPLES, 200, 5)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(SAMPLES, 200, 3)), jnp.float32)

    def forward(p, batch):
        return batch[0] @ p["w"]

    def loss(outputs, batch):
        return scale * jnp.mean((outputs - batch[1]) ** 2)

    p = {"w": jnp.zeros((5, 3))}
    one = cx.fisher(forward, loss, p, (x, y), microbatch_size=1)
    whole = cx.fisher(forward, loss, p, (x, y), linearize=False)
    assert _gradients_kept(one) and not _gradients_kept(whole)
    a, b = dense(one), dense(whole)
    assert np.abs(a - b).max() <= 16 * EPS * np.linalg.norm(b, 2)


@pytest.mark.parametrize(
    "outputs", ["float32", "bfloat16", pytest.param("float64", marks=pytest.mark.slow)]
)
def test_other_dtypes(outputs, params, rng):
    """Parameters in bfloat16, with outputs in float32 and in bfloat16; all in float64."""
    batch = make_batch(rng, SAMPLES, LENGTH)
    forward, loss = CASES["fused object"]
    if outputs == "float64":
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
            x = jnp.asarray(np.asarray(batch["x"]), jnp.float64)
            got = dense(cx.fisher(forward, loss, wide, {**batch, "x": x}, microbatch_size=1))
        want = truth(forward, params, batch)
        assert np.abs(got - want).max() <= 1e-14 * np.linalg.norm(want, 2)
        return
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def rounded(params, batch):
        z = forward(params, batch)
        return z.astype(jnp.bfloat16) if outputs == "bfloat16" else z

    op = cx.fisher(rounded, loss, narrow, batch, microbatch_size=1)
    assert _gradients_kept(op)
    assert_is(op, truth(forward, narrow, batch), 16 * EPS if outputs == "float32" else 2.0**-7)


@pytest.mark.slow
def test_one_draw(params, rng):
    forward, loss = CASES["fused object"]
    batch = make_batch(rng, SAMPLES, LENGTH)
    options = {"kind": "mc", "seed": 3}
    one = cx.fisher(forward, loss, params, batch, microbatch_size=1, **options)
    whole = cx.fisher(forward, loss, params, batch, **options)
    assert _gradients_kept(one)
    assert np.abs(dense(one) - dense(whole)).max() <= 16 * EPS * np.linalg.norm(dense(whole), 2)
    # Of several draws the matrix has not rank one.
    several = cx.fisher(forward, loss, params, batch, microbatch_size=1, num_samples=2, **options)
    assert not _gradients_kept(several)


@pytest.mark.slow
def test_ragged_batches_blocks_and_other_parameters(params, rng):
    """Stacks of different lengths, one of a single sample; the operator elsewhere; its parts."""
    forward, loss = CASES["fused object"]
    batches = [make_batch(rng, 3, LENGTH), make_batch(rng, 2, 2 * LENGTH)]
    batches[1] = jax.tree.map(lambda x: x[:1], batches[1])
    op = cx.fisher(forward, loss, params, batches, microbatch_size=1)
    assert _gradients_kept(op)
    block = jax.random.normal(jax.random.key(0), (3, op.shape[0]))
    want = truth(forward, params, batches)
    got = np.asarray(compiled_product(op, block), np.float64)
    expected = np.asarray(block, np.float64) @ want
    assert np.linalg.norm(got - expected) <= 16 * EPS * np.linalg.norm(expected)
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    assert_is(op.at(moved), truth(forward, moved, batches))
    one = jax.tree.map(lambda x: x[2:3], batches[0])
    assert_is(op.microbatch(2), truth(forward, params, one))
    subset = cx.fisher(forward, loss, params, batches, microbatch_size=1, where=cx.match_names("w"))
    assert_is(subset, want[-40:, -40:])


def test_gradients_are_kept_up_to_twice_the_activations(params, rng):
    forward, loss = CASES["fused object"]
    batch = make_batch(rng, 6)
    op = cx.fisher(forward, loss, params, batch, microbatch_size=1)
    exact = cx.fisher(forward, loss, params, batch, kind="exact", microbatch_size=1)
    activations, gradients = exact.residual_bytes, 6 * op.shape[0] * 4
    assert activations < gradients <= 2 * activations and op.residual_bytes == gradients


def test_long_parameters_are_summed_in_pieces(rng):
    """Of 2²⁰ parameters that all pull the same way, where one float32 sum would show."""
    n, length = 1 << 20, 1 << 19
    x = jnp.asarray(rng.uniform(0.5, 1.5, (2, 2 * length)), jnp.float32)

    def forward(p, batch):
        # Activations as long as the parameters, four times over.
        return jnp.sum(jnp.sin(jnp.cos(jnp.tanh(p["w"] * batch[0]))))[None]

    def loss(outputs, batch):
        return jnp.mean(outputs)

    p = {"w": jnp.full(n, 0.5, jnp.float32)}
    op = cx.fisher(forward, loss, p, x, microbatch_size=1)
    assert _gradients_kept(op, samples=2)
    v = jnp.ones((1, n))
    with jax.enable_x64(True):
        wide = np.asarray(x, np.float64)
        w = jnp.full(n, 0.5, jnp.float64)
        rows = [np.asarray(jax.grad(lambda w, r=r: forward({"w": w}, r[None])[0])(w)) for r in wide]
    expected = sum(r * r.sum() for r in rows) / 2
    got = np.asarray(op.product(v)[0], np.float64)
    assert np.linalg.norm(got - expected) <= 32 * EPS * np.linalg.norm(expected)


def test_a_gradient_that_is_not_finite_is_not_lost(rng):
    """The first sample is fitted exactly, where the norm has no gradient."""

    def forward(p, batch):
        return batch[0] @ p["w"]

    def loss(outputs, batch):
        return jnp.linalg.norm(outputs - batch[1])

    x = jnp.asarray(rng.normal(size=(SAMPLES, 200, 5)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(SAMPLES, 200, 3)), jnp.float32).at[0].set(0)
    op = cx.fisher(forward, loss, {"w": jnp.zeros((5, 3))}, (x, y), microbatch_size=1)
    assert _gradients_kept(op)
    with pytest.raises(FloatingPointError, match="not finite"):
        cx.eigsh(op, 2, seed=0)
