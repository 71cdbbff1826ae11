"""Power iteration: values, residuals of the operator itself, momentum, fresh batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.krylov.spectra import true_residuals

import curvax as cx
from curvax.operators.checked_product import compiled_product

EPS = float(np.finfo(np.float32).eps)


def _matrix(values, seed=0):
    values = np.asarray(values, np.float64)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return (q * values) @ q.T


def _operator(matrix):
    a = jnp.asarray(matrix, jnp.float32)
    return cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"), len(matrix))


SPECTRUM = [9, -7, 5, 3, *np.linspace(-1, 1, 30)]


def test_pairs_and_their_residuals():
    matrix = _matrix(SPECTRUM)
    result = cx.power_iteration(_operator(matrix), 4, tol=1e-4, seed=0)
    assert result.all_converged and result.certified
    np.testing.assert_allclose(result.eigenvalues, [9, 5, 3, -7], rtol=1e-6)
    truth = true_residuals(matrix, result)
    np.testing.assert_allclose(result.residuals, truth, rtol=1e-2, atol=200 * EPS * 9)
    assert np.all(truth <= 1e-4 * 9 * 1.01) and result.orthogonality < 20 * EPS
    assert result.num_matvecs == len(result.history)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 2.0])
def test_momentum_moves_no_eigenvalue(momentum):
    """diag(3, 1, 0.5): with λ taken from the step with momentum it would be 3 − momentum / 3."""
    result = cx.power_iteration(
        _operator(np.diag([3.0, 1, 0.5])), tol=1e-5, momentum=momentum, seed=0
    )
    assert result.all_converged
    np.testing.assert_allclose(result.eigenvalues, [3.0], rtol=1e-6)


def test_momentum_saves_products():
    """Best at λ₂²/4: the error falls by (λ₂/λ₁)^(2 steps) without, far faster with it."""
    op = _operator(_matrix([1.0, 0.97, *np.linspace(0, 0.9, 40)]))
    plain = cx.power_iteration(op, tol=1e-4, seed=0)
    fast = cx.power_iteration(op, tol=1e-4, momentum=0.97**2 / 4, seed=0)
    assert plain.all_converged and fast.all_converged
    assert fast.num_matvecs < plain.num_matvecs / 3


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_only_relative_sizes_matter(scale):
    result = cx.power_iteration(_operator(scale * _matrix(SPECTRUM)), 2, tol=1e-4, seed=0)
    assert result.all_converged
    np.testing.assert_allclose(result.eigenvalues, [9 * scale, -7 * scale], rtol=1e-5)


def test_low_rank_and_zero():
    result = cx.power_iteration(_operator(_matrix([4.0, 2, 0, 0, 0])), 4, tol=1e-4, seed=0)
    assert result.all_converged
    np.testing.assert_allclose(result.eigenvalues, [4, 2, 0, 0], atol=1e-5)
    assert cx.power_iteration(_operator(np.zeros((5, 5))), 2, seed=0).eigenvalues.tolist() == [0, 0]


def test_too_few_products_are_told():
    with pytest.warns(cx.ConvergenceWarning, match=r"0 of 1 pairs .*or use eigsh"):
        result = cx.power_iteration(_operator(_matrix(SPECTRUM)), tol=1e-6, max_matvecs=4, seed=0)
    assert not result.all_converged and result.num_matvecs == 4


def test_equal_magnitudes_never_settle():
    with pytest.warns(cx.ConvergenceWarning):
        result = cx.power_iteration(_operator(_matrix([5.0, -5, 1, 0])), max_matvecs=200, seed=0)
    assert result.residuals[0] > 1


class TestResampling:
    def _problem(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(60, 8)), jnp.float32)
        x = x * jnp.asarray([[3.0, 1, 1, 1, 1, 1, 1, 1]])

        def loss(w, batch):
            return jnp.mean((batch @ w) ** 2)

        return cx.hessian(loss, jnp.ones(8), x, microbatch_size=10)

    def test_is_labelled_uncertified(self):
        op = self._problem()
        result = cx.power_iteration(op, resample=True, max_matvecs=60, seed=0)
        assert not result.certified and not result.converged.any()
        assert np.isnan(result.residuals).all() and result.num_matvecs == 60
        truth = cx.eigsh(op, 1, seed=0).eigenvalues[0]
        # Near, for the batches are alike; and not equal to it.
        assert 1e-4 < abs(result.eigenvalues[0] - truth) / truth < 0.3
        assert "not certified" in str(result)

    def test_multiplies_by_one_microbatch_at_a_time(self):
        op = self._problem()
        v = jnp.ones((1, 8))
        parts = [compiled_product(op.microbatch(i), v) for i in range(op.num_microbatches)]
        assert len(parts) == 6
        np.testing.assert_allclose(sum(parts) / 6, compiled_product(op, v), rtol=1e-5)
        with pytest.raises(IndexError, match="from 0 to 5, got 6"):
            op.microbatch(6)

    def test_leaves_out_microbatches_without_a_label(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)), jnp.float32)
        mask = jnp.ones(30).at[10:20].set(0)

        def loss(w, batch):
            x, mask = batch
            return jnp.sum(mask * (x @ w) ** 2) / jnp.sum(mask), jnp.sum(mask)

        op = cx.hessian(loss, jnp.ones(8), (x, mask), microbatch_size=10)
        np.testing.assert_array_equal(op.microbatch_weights, [10, 0, 10])
        with pytest.raises(ValueError, match="microbatch 1 has the weight 0"):
            op.microbatch(1)
        result = cx.power_iteration(op, resample=True, max_matvecs=30, seed=0)
        assert np.isfinite(result.eigenvalues).all()

    def test_gives_no_values_to_deflate(self):
        op = self._problem()
        result = cx.power_iteration(op, 2, resample=True, max_matvecs=30, seed=0)
        with pytest.raises(ValueError, match="deflate must hold values of this operator"):
            cx.trace(op, num_matvecs=4, method="hutchinson", deflate=result)

    def test_needs_batches(self):
        with pytest.raises(TypeError, match="resample needs an operator with microbatches"):
            cx.power_iteration(_operator(np.eye(3)), resample=True)
        one = cx.hessian(lambda w, x: jnp.mean(x @ w) ** 2, jnp.ones(3), jnp.ones((4, 3)))
        with pytest.raises(ValueError, match="resample needs several microbatches"):
            cx.power_iteration(one, resample=True)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 4}, ValueError, "k must be at most n = 3"),
        ({"tol": -1.0}, ValueError, "tol must be finite and not negative"),
        ({"tol": "1"}, TypeError, "tol must be a number"),
        ({"momentum": float("nan")}, ValueError, "momentum must be finite"),
        ({"max_matvecs": 1}, ValueError, "max_matvecs must be at least 2"),
        ({"callback": 3}, TypeError, "callback must be callable"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        cx.power_iteration(_operator(np.eye(3)), **options)


def test_nothing_is_claimed_of_the_next_eigenvalue():
    """With a gap that is not known the residual is all that is known of the error."""
    op = _operator(np.diag([3.0, 2.9, 1.0]))
    with pytest.warns(cx.ConvergenceWarning):
        result = cx.power_iteration(op, max_matvecs=3, tol=1e-6, seed=0)
    np.testing.assert_array_equal(result.estimated_errors, result.residuals)
    assert result.residuals[0] > 1e-3


def test_products_that_are_not_finite():
    op = cx.from_matvec(lambda v: v / 0.0, 3)
    with pytest.raises(FloatingPointError, match="product 1"):
        cx.power_iteration(op, seed=0)


def test_not_under_jit():
    with pytest.raises(TypeError, match="power_iteration runs on the host"):
        jax.jit(lambda a: cx.power_iteration(a))(jnp.eye(3))
