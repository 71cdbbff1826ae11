"""Damped linear solves against dense float64 solutions."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import curvax as cx

N = 60
NOISE = np.random.default_rng(0).normal(size=(N, N))
Q, _ = np.linalg.qr(NOISE)
PSD = (Q * np.geomspace(1e-4, 10, N)) @ Q.T
INDEFINITE = (Q * np.linspace(-3, 10, N)) @ Q.T
B = np.random.default_rng(1).normal(size=N)


def _operator(matrix, dtype=np.float32):
    a = jnp.asarray(matrix, dtype)
    return cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"), jnp.zeros(N, dtype))


@pytest.mark.parametrize(
    "matrix,damping,method",
    [
        (PSD, 0.1, "cg"),
        (PSD, 0.1, "minres"),
        (INDEFINITE, 0.0, "minres"),
        (INDEFINITE, 0.37, "minres"),
    ],
)
def test_solution_and_its_residual(matrix, damping, method):
    result = cx.solve(
        _operator(matrix), jnp.asarray(B, jnp.float32), damping=damping, method=method
    )
    damped = matrix + damping * np.eye(N)
    x = np.asarray(result.x, np.float64)
    residual = np.linalg.norm(B - damped @ x) / np.linalg.norm(B)
    assert result.converged and residual <= 1.5e-5
    np.testing.assert_allclose(result.relative_residual, residual, rtol=0.2, atol=2e-6)
    truth = np.linalg.solve(damped, B)
    # ‖x − x*‖ ≤ ‖r‖ / min |λ|
    smallest = np.abs(np.linalg.eigvalsh(damped)).min()
    assert np.linalg.norm(x - truth) <= 1.1 * residual * np.linalg.norm(B) / smallest
    assert 2 < result.num_matvecs < 200


def test_float64_and_pytrees():
    with jax.enable_x64(True):
        result = cx.solve(_operator(PSD, np.float64), jnp.asarray(B), damping=1e-2, tol=1e-11)
        truth = np.linalg.solve(PSD + 1e-2 * np.eye(N), B)
        np.testing.assert_allclose(result.x, truth, rtol=1e-7, atol=1e-9)


def test_natural_gradient_of_a_model():
    x = jnp.asarray(NOISE[:, :5], jnp.float32)
    params = {"bias": jnp.zeros(3), "w": 0.3 * jnp.ones((5, 3))}
    labels = jnp.asarray(np.arange(N) % 3)

    def forward(p, batch):
        return batch[0] @ p["w"] + p["bias"][None]

    loss = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])
    op = cx.ggn(forward, loss, params, (x, labels))
    gradient = jax.grad(lambda p: loss(forward(p, (x, labels)), (x, labels))[0])(params)
    result = cx.solve(op, gradient, damping=1e-2)
    assert jax.tree.structure(result.x) == jax.tree.structure(params) and result.converged
    dense = np.asarray(op.product(jnp.eye(18)), np.float64) + 1e-2 * np.eye(18)
    truth = np.linalg.solve(dense, np.asarray(op.ravel(gradient)))
    np.testing.assert_allclose(op.ravel(result.x), truth, rtol=1e-2, atol=1e-3)


class Counted(scipy.sparse.linalg.LinearOperator):
    """A matrix that counts what it multiplies."""

    def __init__(self, matrix):
        self.matrix, self.count = matrix.astype(np.float32), 0
        super().__init__(np.float32, matrix.shape)

    def _matvec(self, v):
        self.count += 1
        return self.matrix @ v.ravel()


class TestWhatItTook:
    @pytest.mark.parametrize("method", ["cg", "minres"])
    @pytest.mark.parametrize("limit", [None, 5])
    def test_products_of_the_iteration_and_of_its_verification(self, method, limit):
        a = Counted(PSD + 0.5 * np.eye(N))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cx.ConvergenceWarning)
            result = cx.solve(a, jnp.asarray(B, jnp.float32), method=method, max_matvecs=limit)
        assert result.num_matvecs + result.num_verification == a.count
        # One measures the residual; as many as were made look for a reason where it is too large.
        assert result.num_verification == (1 if result.converged else 1 + result.num_matvecs)
        assert result.converged == (limit is None)
        # Beside SciPy's steps, and one that MINRES begins with: what measures where they stopped.
        assert limit is None or limit <= result.num_matvecs <= limit + 2

    def test_seconds_by_part(self):
        result = cx.solve(_operator(PSD), jnp.asarray(B, jnp.float32), damping=0.3)
        parts = dict(result.seconds)
        total = parts.pop("total")
        assert list(parts) == ["compile", "products", "host", "verification"]
        # Programs that another operator has compiled are not compiled again.
        assert parts.pop("compile") >= 0
        assert all(spent > 0 for spent in parts.values()) and sum(parts.values()) <= total


class TestPositiveDefinite:
    def test_is_measured(self):
        with pytest.raises(ValueError, match=r"Ritz value is -.*method='minres', or damping above"):
            cx.solve(_operator(INDEFINITE), jnp.asarray(B, jnp.float32), max_matvecs=40)

    def test_the_damping_named_is_enough(self):
        cx.solve(_operator(INDEFINITE), jnp.asarray(B, jnp.float32), damping=3.2)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_too_few_products_are_told(method):
    with pytest.warns(cx.ConvergenceWarning, match="the relative residual is"):
        result = cx.solve(
            _operator(PSD), jnp.asarray(B, jnp.float32), damping=1e-4, max_matvecs=5, method=method
        )
    assert not result.converged and result.relative_residual > 1e-3


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"method": "lu"}, ValueError, r"method must be one of \('cg', 'minres'\), got 'lu'"),
        ({"damping": -1.0}, ValueError, "damping must be finite and not negative"),
        ({"damping": None}, TypeError, "damping must be a number"),
        ({"tol": float("inf")}, ValueError, "tol must be finite"),
        ({"max_matvecs": 0}, ValueError, "max_matvecs must be at least 1"),
        ({"b": jnp.zeros(N)}, ValueError, "b must be finite and not zero"),
        ({"b": jnp.full(N, jnp.nan)}, ValueError, "b must be finite and not zero"),
        ({"b": jnp.ones(3)}, ValueError, "b must have shape"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        cx.solve(_operator(PSD), **{"b": jnp.ones(N), **options})


def test_a_tuple_of_unequal_leaves():
    like = (jnp.ones((4, 3)), jnp.ones(3))
    op = cx.identity(like)
    result = cx.solve(op, like, damping=1.0)
    np.testing.assert_allclose(op.ravel(result.x), np.full(15, 0.5), rtol=1e-3)
