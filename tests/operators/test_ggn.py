"""The Gauss-Newton operator against a dense `Jᵀ H J` in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax import losses
from curvax.models import gpt

EPS = 2.0**-23


def labels_of(batch):
    return batch[1]


@pytest.fixture
def problem(rng):
    params = {
        "w": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=(11, 8)), jnp.float32),
    }
    labels = rng.integers(0, 11, 20).astype(np.int32)
    labels[3] = -100
    return params, (jnp.asarray(rng.normal(size=(20, 5)), jnp.float32), jnp.asarray(labels))


def logits(params, batch):
    return jnp.tanh(batch[0] @ params["w"]) @ params["h"].T


def parts(params, batch):
    return jnp.tanh(batch[0] @ params["w"]), params["h"]


def plain(outputs, batch):
    kept = batch[1] != -100
    index = jnp.where(kept, batch[1], 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(outputs), index[:, None], 1)[:, 0]
    return -jnp.sum(jnp.where(kept, picked, 0)) / kept.sum().astype(outputs.dtype), kept.sum()


def plain_capped(outputs, batch):
    return plain(3 * jnp.tanh(outputs / 3), batch)


def by_function(outputs, batch):
    return losses.softmax_cross_entropy(outputs, batch[1], return_weight=True)


def dense(op):
    return np.asarray(op.product(jnp.eye(op.shape[0], dtype=op.dtype)), np.float64)


def truth(forward, loss, params, batch):
    """Jacobian and Hessian one by one, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        batch = (jnp.asarray(np.asarray(batch[0], np.float64)), batch[1])
        flat, unravel = ravel_pytree(wide)
        shape = forward(wide, batch).shape
        jacobian = jax.jacobian(lambda f: forward(unravel(f), batch).ravel())(flat)
        hessian = jax.hessian(lambda o: loss(o.reshape(shape), batch)[0])(
            forward(wide, batch).ravel()
        )
        return np.asarray(jacobian.T @ hessian @ jacobian)


CASES = {
    "any loss": (logits, plain),
    "fused function": (logits, by_function),
    "fused object": (logits, losses.SoftmaxCrossEntropy(labels_of)),
    "no logits": (parts, losses.LinearCrossEntropy(labels_of, chunk=7)),
}


@pytest.mark.thin(6)
@pytest.mark.parametrize("microbatch_size", [None, 6])
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_is_the_dense_product(case, linearize, microbatch_size, problem):
    forward, loss = CASES[case]
    op = cx.ggn(forward, loss, *problem, linearize=linearize, microbatch_size=microbatch_size)
    got, want = dense(op), truth(logits, plain, *problem)
    scale = np.abs(want).max()
    assert np.abs(got - want).max() <= 16 * EPS * scale
    assert np.abs(got - got.T).max() <= 4 * EPS * scale
    assert np.linalg.eigvalsh((got + got.T) / 2)[0] >= -16 * EPS * np.linalg.norm(want, 2)
    np.testing.assert_allclose(op.loss, plain(logits(*problem), problem[1])[0], rtol=1e-6)
    assert op.weight == 19
    assert (op.residual_bytes > 0) == linearize


@pytest.mark.parametrize(
    "forward,loss",
    [
        (logits, losses.SoftmaxCrossEntropy(labels_of, softcap=3.0)),
        (parts, losses.LinearCrossEntropy(labels_of, softcap=3.0, chunk=6)),
    ],
)
def test_softcap_is_part_of_the_model(forward, loss, problem):
    """The loss is convex in the capped logits; in those before the cap it need not be."""

    def capped(params, batch):
        return 3 * jnp.tanh(logits(params, batch) / 3)

    got, want = dense(cx.ggn(forward, loss, *problem)), truth(capped, plain, *problem)
    scale = np.linalg.norm(want, 2)
    assert np.abs(got - want).max() <= 16 * EPS * scale
    assert np.linalg.eigvalsh((got + got.T) / 2)[0] >= -16 * EPS * scale
    not_convex = truth(logits, plain_capped, *problem)
    assert np.linalg.eigvalsh(not_convex)[0] < -1e-3 * scale


def test_mean_squared_error(problem, rng):
    params, (x, _) = problem
    targets = jnp.asarray(rng.normal(size=(20, 11)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=20), jnp.float32)
    loss = losses.MeanSquaredError(lambda batch: batch[1], lambda batch: batch[2])

    def by_jax(outputs, batch):
        residual = outputs - batch[1].astype(outputs.dtype)
        share = batch[2].astype(outputs.dtype)[:, None]
        return jnp.sum(share * residual**2) / (11 * share.sum()), 11 * share.sum()

    class NoProduct:
        def __call__(self, outputs, batch):
            return loss(outputs, batch)

    batch = (x, targets, weights)
    with jax.enable_x64(True):
        want = truth(logits, lambda o, b: by_jax(o, batch), params, batch)
    for own in (loss, NoProduct()):
        op = cx.ggn(logits, own, params, batch)
        assert np.abs(dense(op) - want).max() <= 16 * EPS * np.abs(want).max()


def test_subsets_blocks_and_vectors(problem):
    params, batch = problem
    forward, loss = CASES["no logits"]
    want = truth(logits, plain, *problem)
    part = cx.ggn(forward, loss, params, batch, where=cx.match_names("w"))
    names = cx.ggn(forward, loss, params, batch).space.names
    assert names == ("h", "w")
    assert np.abs(dense(part) - want[88:, 88:]).max() <= 16 * EPS * np.abs(want).max()
    op = cx.ggn(forward, loss, params, batch)
    block = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), params)
    got = op.ravel(op @ block)
    single = np.stack(
        [op.ravel(op @ params), op.ravel(op @ jax.tree.map(lambda x: -2 * x, params))]
    )
    assert np.abs(got - single).max() <= 8 * EPS * np.abs(single).max()
    assert "GaussNewton(shape=(128, 128)" in repr(op)


def test_eigenvalues(problem):
    forward, loss = CASES["no logits"]
    result = cx.eigsh(cx.ggn(forward, loss, *problem), 4, tol=1e-4, seed=0)
    want = np.linalg.eigvalsh(truth(logits, plain, *problem))[::-1][:4]
    np.testing.assert_allclose(result.eigenvalues, want, rtol=1e-5)
    assert result.all_converged


@pytest.fixture
def default_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_of_a_transformer_is_its_fisher(default_promotion):
    """For the softmax cross entropy: the labels' expected outer products of gradients."""
    params = gpt.init(jax.random.key(0), layers=1, width=8, context=6)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 256)

    def forward(params, batch):
        return gpt.forward(params, batch[:, :-1])

    op = cx.ggn(forward, losses.SoftmaxCrossEntropy(lambda batch: batch[:, 1:]), params, tokens)

    @jax.jit
    def fisher(params, v):
        outputs, pushed = jax.jvp(lambda p: forward(p, tokens), (params,), (v,))
        p = jax.nn.softmax(outputs)
        u = p * (pushed - jnp.sum(p * pushed, -1, keepdims=True)) / 10
        return ravel_pytree(jax.vjp(lambda p: forward(p, tokens), params)[1](u)[0])[0]

    v = op.unravel(jax.random.normal(jax.random.key(2), (op.shape[0],)))
    with jax.enable_x64(True):
        wide = [
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), t) for t in (params, v)
        ]
        want = np.asarray(fisher(*wide))
    got = np.asarray(op.ravel(op @ v))
    assert np.abs(got - want).max() <= 64 * EPS * np.abs(want).max()


def test_bad_input(problem):
    params, batch = problem
    loss = losses.SoftmaxCrossEntropy(labels_of)
    with pytest.raises(TypeError, match=r"forward must be callable as forward\(params, batch\)"):
        cx.ggn(3, loss, params, batch)
    with pytest.raises(TypeError, match=r"loss must be callable as loss\(outputs, batch\)"):
        cx.ggn(logits, None, params, batch)
    with pytest.raises(TypeError, match="forward must return real floating arrays, got int32"):
        cx.ggn(lambda p, b: (logits(p, b), b[1]), lambda o, b: plain(o[0], b), params, batch)
    with pytest.raises(ValueError, match="linearize must be True, False or 'auto'"):
        cx.ggn(logits, loss, params, batch, linearize="yes")
    with pytest.raises(ValueError, match="scalar mean, got shape"):
        cx.ggn(logits, lambda o, b: jnp.sum(o, 1), params, batch)

    class Wrong(losses.SoftmaxCrossEntropy):
        def hessian_product(self, outputs, batch, u):
            return u[:, :2]

    with pytest.raises(TypeError, match="hessian_product must return the structure, shapes"):
        cx.ggn(logits, Wrong(labels_of), params, batch)


@pytest.mark.parametrize("case", ["fused object", "no logits"])
def test_labels_without_a_class(case, problem):
    params, (x, labels) = problem
    forward, loss = CASES[case]
    with pytest.raises(FloatingPointError, match="a label out of range"):
        cx.ggn(forward, loss, params, (x, labels.at[0].set(11)))
    with pytest.raises(ValueError, match="weights that loss returned must have a positive sum"):
        cx.ggn(forward, loss, params, (x, jnp.full_like(labels, -100)))
