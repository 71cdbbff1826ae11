"""The sharpness along a training run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.models import gpt


def _data(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, Y = _data(0, 64, 4), _data(1, 64)


def _loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2)


PARAMS = {"v": _data(2, 16), "w": _data(3, 4, 16)}


def products(result):
    """All that a step took."""
    return result.num_matvecs + result.num_verification


class TestOtherParameters:
    @pytest.mark.parametrize("linearize", [True, False])
    def test_is_the_operator_made_there(self, linearize):
        batches = [(X[:20], Y[:20]), (X[20:40], Y[20:40]), (X[40:], Y[40:])]
        other = jax.tree.map(lambda leaf: 1.5 * leaf, PARAMS)
        moved = cx.hessian(_loss, PARAMS, batches, linearize=linearize).at(other)
        fresh = cx.hessian(_loss, other, batches, linearize=linearize)
        v = _data(4, 2, 80)
        np.testing.assert_allclose(moved.product(v), fresh.product(v), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moved.loss, fresh.loss, rtol=1e-6)

    def test_compiles_nothing_again(self):
        traces = []

        def loss(p, batch):
            traces.append(0)
            return _loss(p, batch)

        op = cx.hessian(loss, PARAMS, (X, Y))
        op @ PARAMS
        before = len(traces)
        for scale in (0.5, 2.0):
            other = jax.tree.map(lambda leaf, s=scale: s * leaf, PARAMS)
            op = op.at(other)
            op @ other
        assert len(traces) == before

    def test_subsets_and_leaves_that_are_not_arrays(self):
        params = {**PARAMS, "name": "mlp"}
        op = cx.hessian(_loss, params, (X, Y), where=cx.match_names("v"))
        other = {**jax.tree.map(lambda leaf: 2 * leaf, PARAMS), "name": "mlp"}
        fresh = cx.hessian(_loss, other, (X, Y), where=cx.match_names("v"))
        v = _data(5, 1, 16)
        np.testing.assert_allclose(op.at(other).product(v), fresh.product(v), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "params,message",
        [
            ({"v": PARAMS["v"]}, "params must have the structure"),
            ({"v": jnp.ones(3), "w": PARAMS["w"]}, r"must have shape \(16,\), got \(3,\)"),
        ],
    )
    def test_bad_input(self, params, message):
        with pytest.raises(ValueError, match=message):
            cx.hessian(_loss, PARAMS, (X, Y)).at(params)

    def test_what_is_part_of_the_program_stays(self):
        op = cx.hessian(_loss, {**PARAMS, "name": "mlp"}, (X, Y), where=cx.match_names("v"))
        told = "leaf 0 of params, 'name', is not an array.*'mlp', got 'cnn'"
        with pytest.raises(ValueError, match=told):
            op.at({**PARAMS, "name": "cnn"})
        with pytest.raises(ValueError, match=r"must have shape \(16,\), got \(\)"):
            cx.hessian(_loss, PARAMS, (X, Y)).at({**PARAMS, "v": 3.0})

    def test_a_loss_that_is_not_finite(self):
        op = cx.hessian(_loss, PARAMS, (X, Y))
        with pytest.raises(FloatingPointError, match="the loss is nan"):
            op.at(jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS))


def test_along_a_descent():
    """At every step the largest eigenvalue, to the tolerance, from less than half the products."""
    op, params, result = cx.hessian(_loss, PARAMS, (X, Y)), PARAMS, None
    gradient = jax.jit(jax.grad(_loss))
    warm = cold = 0
    for i in range(20):
        op = op.at(params)
        result = cx.sharpness(op, result, tol=1e-2)
        scratch = cx.sharpness(op, tol=1e-2, seed=i)
        truth = np.linalg.eigvalsh(np.asarray(op.product(jnp.eye(80)), np.float64))[-1]
        assert result.all_converged
        np.testing.assert_allclose(result.eigenvalues[0], truth, rtol=1e-2)
        if i:
            warm += products(result)
            cold += products(scratch)
        params = jax.tree.map(lambda p, g: p - 0.002 * g, params, gradient(params, (X, Y)))
    assert 2 * warm <= cold


def test_what_overtakes_is_found_from_scratch():
    """The second eigenvalue jumps over the first: the warm bound holds, of another eigenvalue."""

    def with_second(value):
        d = jnp.asarray([5.0, value, *np.linspace(-1, 1, 98)], jnp.float32)
        return cx.from_matvec(lambda v: d * v, 100)

    before, after = with_second(4.0), with_second(6.0)
    warm = cx.sharpness(after, cx.sharpness(before, seed=0), seed=0)
    assert np.abs(warm.eigenvalues[0] - np.array([5.0, 6.0])).min() <= warm.bounds[0] + 1e-5
    np.testing.assert_allclose(cx.sharpness(after, seed=0).eigenvalues[0], 6, rtol=1e-2)


@pytest.mark.parametrize("previous", [3.0, "bare"])
def test_bad_input(previous):
    op = cx.hessian(_loss, PARAMS, (X, Y))
    if previous == "bare":
        previous = cx.eigsh(op, 1, return_eigenvectors=False, seed=0)
    with pytest.raises(TypeError, match="previous must be an EigenResult with its eigenvector"):
        cx.sharpness(op, previous)


@pytest.fixture
def default_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("default_promotion")
def test_on_the_shipped_gpt():
    """At the last rate of its training: at most half of the products of solves from scratch."""
    params, batch = gpt.load()
    op, result = cx.hessian(gpt.loss, params, batch[:4]), None
    step = jax.jit(
        lambda p, b: jax.tree.map(lambda x, g: x - 3e-4 * g, p, jax.grad(gpt.loss)(p, b))
    )
    warm = cold = 0
    for i in range(5):
        op = op.at(params)
        result = cx.sharpness(op, result)
        if i:
            warm += products(result)
            cold += products(cx.sharpness(op, seed=i))
        params = step(params, batch[4 * i : 4 * i + 4])
    assert 2 * warm <= cold, (warm, cold)
