"""Hessians by central differences of the gradient: their error, and the measure of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx


def _data(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _params(scale=1.0):
    return {"v": scale * _data(0, 20), "w": scale * _data(1, 6, 20)}


X, Y = _data(2, 64, 6), _data(3, 64)


def _loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2)


def _dense(op):
    return np.asarray(op.product(jnp.eye(op.shape[0], dtype=op.dtype)), np.float64)


def _error(op, exact, vector):
    product, truth = np.asarray(op.product(vector[None])[0]), exact @ np.asarray(vector)
    return np.linalg.norm(product - truth) / np.linalg.norm(truth)


@functools.cache
def _exact(scale=1.0):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (_params(scale), (X, Y)))
        return _dense(cx.hessian(_loss, *wide))


@functools.cache
def _differences(scale=1.0):
    return cx.hessian(_loss, _params(scale), (X, Y), method="finite_difference")


# From far below the typical size of a weight to far above it.
@pytest.mark.thin(6)
@pytest.mark.parametrize("scale", [0.02, 1.0])
@pytest.mark.parametrize("length", [1e-20, 1.0, 1e20])
def test_the_error_is_what_was_measured(scale, length):
    op, exact = _differences(scale), _exact(scale)
    assert 0 < op.relative_error < 2e-2
    _, vectors = np.linalg.eigh(exact)
    random = _data(4, 140)
    for vector in (random, jnp.asarray(vectors[:, -1], jnp.float32)):
        assert _error(op, exact, length * vector) <= 2 * op.relative_error


def test_float64_is_far_more_accurate():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (_params(), (X, Y)))
        op = cx.hessian(_loss, *wide, method="finite_difference")
        assert op.relative_error < 1e-7
        assert _error(op, _exact(), jnp.asarray(_data(4, 140), jnp.float64)) < 1e-8


def test_a_step_for_unit_vectors_is_not_one_for_long_ones():
    """What a fixed step does: with the step of a unit vector, √n times that vector goes wrong."""
    op, exact = _differences(), _exact()
    assert _error(op.with_step(100 * op.relative_step), exact, _data(4, 140)) > 0.05
    assert _error(op.with_step(1e-4 * op.relative_step), exact, _data(4, 140)) > 0.01


def test_eigenvalues():
    result = cx.eigsh(_differences(), 3, tol=1e-2, seed=0)
    truth = np.linalg.eigvalsh(_exact())
    truth = np.sort(truth[np.argsort(-np.abs(truth))][:3])[::-1]
    np.testing.assert_allclose(result.eigenvalues, truth, rtol=5e-3)


@jax.custom_vjp
def _opaque(x):
    return jnp.sum(jnp.cosh(x))


def _backward(x, g):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    slope = jax.pure_callback(np.sinh, shape, x, vmap_method="expand_dims")
    return (g * slope,)


_opaque.defvjp(lambda x: (_opaque(x), x), _backward)


class TestWithoutSecondDerivative:
    """The backward pass calls NumPy: no second derivative exists, and the Hessian is diagonal."""

    def _loss(self, p, batch):
        return _opaque(p) * jnp.mean(batch)

    def test_autodiff_names_the_remedy(self):
        with pytest.raises(TypeError, match=r"_opaque.*method='finite_difference'"):
            cx.hessian(self._loss, jnp.linspace(0.1, 1, 9), jnp.ones(3))

    def test_differences_give_it(self):
        p = jnp.linspace(0.1, 1, 9, dtype=jnp.float32)
        op = cx.hessian(self._loss, p, jnp.ones(3), method="finite_difference")
        block = op.matmat(jnp.eye(9))
        truth = np.diag(np.cosh(np.asarray(p, np.float64)))
        assert np.abs(np.asarray(block) - truth).max() <= 2e-3


def test_several_batches_subsets_and_zero_parameters():
    params = {"v": jnp.zeros(20), "w": _params()["w"]}
    batches = [(X[:30], Y[:30]), (X[30:], Y[30:])]
    exact = cx.hessian(_loss, params, (X, Y), where=cx.match_names("v"))
    op = cx.hessian(
        _loss, params, batches, where=cx.match_names("v"),
        method="finite_difference",
    )  # fmt: skip
    truth = _dense(exact)
    assert np.abs(_dense(op) - truth).max() <= 1e-3 * np.abs(truth).max()
    np.testing.assert_allclose(op.loss, exact.loss, rtol=1e-6)
    np.testing.assert_array_equal(op.product(jnp.zeros((1, 20))), np.zeros((1, 20)))


def test_bad_input():
    with pytest.raises(ValueError, match="method must be 'autodiff' or 'finite_difference'"):
        cx.hessian(_loss, _params(), (X, Y), method="fd")
    with pytest.raises(ValueError, match="linearize must not be True"):
        cx.hessian(_loss, _params(), (X, Y), method="finite_difference", linearize=True)


class TestNumBatches:
    def test_reads_no_more(self):
        read = []

        def loader():
            for i in range(5):
                read.append(i)
                yield X[10 * i : 10 * i + 10], Y[10 * i : 10 * i + 10]

        capped = cx.hessian(_loss, _params(), loader(), num_batches=2)
        assert read == [0, 1]
        whole = cx.hessian(_loss, _params(), (X[:20], Y[:20]))
        v = _data(5, 1, 140)
        np.testing.assert_allclose(capped.product(v), whole.product(v), rtol=1e-5, atol=1e-6)
        assert float(capped.weight) == 20

    @pytest.mark.parametrize("count,error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
    def test_bad_input(self, count, error):
        with pytest.raises(error, match="num_batches must be"):
            cx.hessian(_loss, _params(), [(X, Y)], num_batches=count)

    def test_a_loader_that_ends_early(self):
        batches = ((X[i : i + 10], Y[i : i + 10]) for i in (0, 10))
        with pytest.raises(ValueError, match="num_batches=3 that are to be read, but end after 2"):
            cx.hessian(_loss, _params(), batches, num_batches=3)


def test_steps_out_of_the_domain_are_not_taken():
    """Beyond 1e-3 the first logarithm is of a negative number."""

    def loss(p, _):
        return -jnp.sum(jnp.log(p))

    p = jnp.asarray([1e-3, 1.0, 1.0])
    with pytest.warns(UserWarning, match="products are off by"):
        op = cx.hessian(loss, p, jnp.zeros(1), method="finite_difference")
    v = jnp.asarray([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    error = np.abs(np.asarray(op.product(v)) - np.diag(1 / np.asarray(p) ** 2)).max()
    # NaN where no step is good: an error of 0 was claimed once.
    assert not op.relative_error == 0
    assert np.isnan(op.relative_error) or error <= 10 * float(op.relative_error) * 1e6


class TestParametersOfDifferentSizes:
    """No step serves all: one that moves the largest enough moves the smallest too far."""

    @staticmethod
    def _pair(ratio):
        sizes = np.float32([1 / ratio, 1, ratio])
        x = _data(0, 50, 3)

        def loss(p, batch):
            return jnp.mean((jnp.tanh(batch @ (p / sizes)) - 0.3) ** 2)

        p = jnp.asarray(0.2 * sizes)
        difference = cx.hessian(loss, p, x, method="finite_difference")
        return _dense(difference), _dense(cx.hessian(loss, p, x)), difference.relative_error

    @pytest.mark.parametrize("ratio", [100.0, 1000.0])
    def test_are_told_of(self, ratio):
        with pytest.warns(UserWarning, match="parameters of very different sizes"):
            differences, exact, error = self._pair(ratio)
        true = np.abs(differences - exact).max() / np.abs(exact).max()
        assert true > 0.05 and error > true / 10

    @pytest.mark.parametrize("ratio", [1.0, 10.0])
    def test_of_like_sizes_pass(self, ratio):
        differences, exact, error = self._pair(ratio)
        assert error < 1e-2
        assert np.abs(differences - exact).max() < 3 * error * np.abs(exact).max()


class TestWithStep:
    def test_forgets_the_error(self):
        op = _differences()
        assert np.isnan(op.with_step(op.relative_step).relative_error)

    @pytest.mark.parametrize(
        "step,error", [(0.0, ValueError), (-1, ValueError), (np.nan, ValueError), ("1", TypeError)]
    )
    def test_bad_input(self, step, error):
        with pytest.raises(error, match="relative_step must be"):
            _differences().with_step(step)
