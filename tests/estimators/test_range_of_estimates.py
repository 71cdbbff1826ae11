"""Estimates of operators at the ends of the floating-point range."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import curvax as cx

N = 60
VALUES = np.append([9.0, 8.0, 7.0], np.linspace(1, 2, N - 3))
slow = pytest.mark.slow
SIZES = [1e-37, pytest.param(1e-33, marks=slow), pytest.param(1e30, marks=slow), 3e37]


def _matrix(size):
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    a = (q * VALUES) @ q.T
    return ((a + a.T) / 2 * size).astype(np.float32)


def _both(estimate, size):
    """An estimate for the matrix and for the matrix times `size`, of the same random numbers."""
    return estimate(_matrix(1.0), 1.0), estimate(_matrix(size), size)


@pytest.mark.thin(4)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace", "xnystrace", "auto"])
def test_trace(size, method):
    count = N if method == "auto" else 20
    plain, scaled = _both(lambda a, _: cx.trace(a, method=method, num_matvecs=count, seed=0), size)
    truth = VALUES.sum() * size
    assert scaled.interval[0] <= truth <= scaled.interval[1]
    np.testing.assert_allclose(scaled.estimate / size, plain.estimate, rtol=1e-5)
    np.testing.assert_allclose(scaled.stderr / size, plain.stderr, rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(np.divide(scaled.interval, size), plain.interval, rtol=1e-4)
    np.testing.assert_allclose(scaled.samples / size, plain.samples, rtol=1e-4)
    for small, last in zip(scaled.history, plain.history, strict=True):
        np.testing.assert_allclose(small.estimate / size, last.estimate, rtol=1e-4)
    assert f"{scaled.estimate:.6g}" in str(scaled)


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_trace_until_a_standard_error(size):
    seen = []
    a = _matrix(size)
    result = cx.trace(
        a, method="hutchinson", num_matvecs=10, until=3 * size, seed=0, callback=seen.append
    )
    assert result.stderr <= 3 * size and tuple(seen) == result.history
    np.testing.assert_allclose(seen[-1].until, 3 * size)
    shown = re.escape(f"above until={0.01 * size:.3g}")
    with pytest.warns(cx.ConvergenceWarning, match=shown):
        cx.trace(a, method="hutchinson", num_matvecs=10, max_matvecs=20, until=0.01 * size, seed=0)


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_deflated(size):
    a = _matrix(size)
    pairs = cx.eigsh(a, 3, seed=0, max_basis=30, tol=1e-5)
    result = cx.trace(a, method="hutchinson", deflate=pairs, num_matvecs=30, seed=0)
    assert result.interval[0] <= VALUES.sum() * size <= result.interval[1]
    assert result.stderr < 1 * size
    density = cx.spectral_density(a, deflate=pairs, num_runs=2, num_steps=20, seed=0)
    np.testing.assert_allclose(density.atoms, pairs.eigenvalues)
    np.testing.assert_allclose(density.outliers[:3] / size, VALUES[:3], rtol=1e-5)
    determinant = cx.log_det(a, deflate=pairs, num_runs=5, num_steps=20, seed=0)
    truth = np.sum(np.log(VALUES)) + N * np.log(size)
    assert determinant.interval[0] <= truth <= determinant.interval[1]
    with pytest.raises(ValueError, match=r"very operator.* are [0-9.]+e[+-]3\d together"):
        cx.trace(_matrix(1.5 * size), deflate=pairs, num_matvecs=20, seed=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["hutchinson", "xdiag", "exact"])
def test_diagonal(size, method):
    plain, scaled = _both(lambda a, _: cx.diagonal(a, method=method, num_matvecs=40, seed=0), size)
    wide = np.asarray(scaled.estimate).astype(np.float64) / size
    np.testing.assert_allclose(wide, plain.estimate, rtol=1e-4, atol=1e-5)
    wide = np.asarray(scaled.stderr).astype(np.float64) / size
    np.testing.assert_allclose(wide, plain.stderr, rtol=1e-2, atol=1e-5)
    if method == "exact":
        np.testing.assert_allclose(scaled.estimate / np.float32(size), np.diag(_matrix(1.0)), 1e-5)


@pytest.mark.parametrize("estimator", [cx.trace, cx.diagonal, cx.eigsh])
def test_blocks(estimator):
    values = {"a": np.linspace(1, 2, 8), "b": np.linspace(3, 4, 8)}
    truth = {name: (v * 2e-36).astype(np.float32) for name, v in values.items()}
    op = cx.from_matvec(lambda v: jax.tree.map(jnp.multiply, truth, v), truth)
    more = {"k": 1} if estimator is cx.eigsh else {}
    results = estimator(op.blocks(by=1), seed=0, **more)
    for name, result in results.items():
        if estimator is cx.trace:
            np.testing.assert_allclose(result.estimate, truth[name].sum(dtype=np.float64), 1e-5)
        elif estimator is cx.diagonal:
            (estimate,) = jax.tree.leaves(result.estimate)
            np.testing.assert_allclose(np.asarray(estimate), truth[name], rtol=1e-5)
        else:
            np.testing.assert_allclose(result.eigenvalues, truth[name].max(), rtol=1e-5)


def test_a_block_far_smaller_than_the_others():
    """The operator as a whole is not scaled for it; its interval knows what is read as zero."""
    d = {"a": np.linspace(1, 2, 80), "b": np.linspace(1, 2, 80) * 1e-39}
    d = {name: values.astype(np.float32) for name, values in d.items()}
    op = cx.from_matvec(lambda v: jax.tree.map(jnp.multiply, d, v), d)
    results = cx.trace(op.blocks(by=1), num_matvecs=10, seed=0)
    for name, result in results.items():
        truth = d[name].sum(dtype=np.float64)
        assert result.interval[0] <= truth <= result.interval[1]
    assert results["b"].interval[1] < 1e-35


@pytest.mark.parametrize("size", SIZES)
def test_power_iteration_and_sharpness(size):
    a = _matrix(size)
    seen = []
    result = cx.power_iteration(a, 2, seed=0, callback=seen.append, tol=1e-2)
    np.testing.assert_allclose(result.eigenvalues / size, [9, 8], rtol=1e-3)
    assert result.all_converged and np.all(result.residuals > 0)
    assert tuple(seen) == result.history
    # β = (λ₂ / 2)², in units of eigenvalues squared.
    if 1e-150 < (4 * size) ** 2 < 1e150:
        fast = cx.power_iteration(a, 1, seed=0, momentum=(4 * size) ** 2, tol=1e-2)
        plain = cx.power_iteration(_matrix(1.0), 1, seed=0, momentum=16.0, tol=1e-2)
        assert fast.num_matvecs == plain.num_matvecs
    first = cx.sharpness(a, seed=0)
    np.testing.assert_allclose(first.eigenvalues / size, [9], rtol=1e-3)
    again = cx.sharpness(a, first)
    assert (again.num_matvecs, again.num_verification) == (0, 1)
    np.testing.assert_allclose(again.eigenvalues / size, [9], rtol=1e-3)
    # Not good any more: nothing is left of it.
    moved = cx.sharpness(_matrix(size)[::-1, ::-1], first)
    np.testing.assert_allclose(moved.eigenvalues / size, [9], rtol=1e-3)
    assert moved.num_matvecs > 1


def test_power_iteration_on_fresh_microbatches():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)), jnp.float32)
    results = []
    for size in (1.0, 2.0**-80):
        op = cx.hessian(
            lambda p, b: size * jnp.mean((b @ p) ** 2),  # noqa: B023
            jnp.ones(5),
            x,
            microbatch_size=10,
        )
        results.append(cx.power_iteration(op, resample=True, max_matvecs=20, seed=0).eigenvalues)
    np.testing.assert_allclose(results[1] * 2.0**80, results[0], rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_quadrature(size):
    # In 8 steps no outlier returns as a ghost, whose moment rounding decides.
    plain, scaled = _both(
        lambda a, s: cx.spectral_density(a, num_runs=3, num_steps=8, width=0.05 * s, seed=0), size
    )
    np.testing.assert_allclose(scaled.width, 0.05 * size)
    np.testing.assert_allclose(scaled.quantile(0.5) / size, plain.quantile(0.5), rtol=1e-5)
    np.testing.assert_allclose(scaled.outliers[:3] / size, VALUES[:3], rtol=1e-4)
    density, lower, upper = scaled.evaluate(np.array([1.5]) * size)
    expected = plain.evaluate(np.array([1.5]))
    np.testing.assert_allclose(np.stack([density, lower, upper]) * size, expected, rtol=1e-5)
    mass = np.trapezoid(scaled.density, scaled.grid)
    np.testing.assert_allclose(mass, 1, rtol=1e-3)
    determinant = cx.log_det(_matrix(size), num_runs=5, num_steps=30, seed=0)
    truth = np.sum(np.log(VALUES)) + N * np.log(size)
    assert determinant.interval[0] <= truth <= determinant.interval[1]
    assert determinant.interval[1] - determinant.interval[0] < 40
    damped = cx.log_det(_matrix(size), damping=3 * size, num_runs=5, num_steps=30, seed=0)
    truth = np.sum(np.log(VALUES + 3)) + N * np.log(size)
    assert damped.interval[0] <= truth <= damped.interval[1]


def test_log_det_names_a_damping_in_the_units_of_the_operator():
    a = 1e-35 * np.diag(np.append(-1.0, np.ones(30))).astype(np.float32)
    with pytest.raises(ValueError, match=r"Ritz value of -1e-35.* damping=1.1e-35"):
        cx.log_det(a.astype(np.float32), num_steps=10, seed=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("full", [False, True])
def test_tridiagonal(size, full):
    plain, scaled = _both(
        lambda a, _: cx.lanczos_tridiagonal(a, 7, reorthogonalize=full, seed=0), size
    )
    np.testing.assert_allclose(scaled.alphas / size, plain.alphas, rtol=1e-3)
    np.testing.assert_allclose(scaled.betas / size, plain.betas, rtol=1e-3)
    np.testing.assert_allclose(scaled.last_beta / size, plain.last_beta, rtol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_solve(size, method):
    a = _matrix(size)
    x = np.random.default_rng(1).normal(size=N)
    b = (a.astype(np.float64) @ x).astype(np.float32)
    result = cx.solve(a, b, method=method)
    assert result.converged
    np.testing.assert_allclose(result.x, x, atol=1e-3)
    damped = cx.solve(a, b, method=method, damping=2 * size)
    truth = np.linalg.solve(_matrix(1.0) + 2 * np.eye(N), b.astype(np.float64) / size)
    np.testing.assert_allclose(damped.x, truth, atol=1e-3)


def test_solutions_at_the_ends_of_the_range():
    ones = np.ones(5, np.float32)
    eye = np.eye(5, dtype=np.float32)
    np.testing.assert_allclose(cx.solve(1e-37 * eye, 1e-3 * ones).x, 1e34 * ones, rtol=1e-4)
    np.testing.assert_allclose(cx.solve(1e30 * eye, ones).x, 1e-30 * ones, rtol=1e-4)
    np.testing.assert_allclose(cx.solve(eye, 1e-30 * ones).x, 1e-30 * ones, rtol=1e-4)
    for a, b in ((1e-37, 1e5), (1e30, 1e-5)):
        with pytest.raises(FloatingPointError, match="leaves the range of float32: multiply b"):
            cx.solve(np.float32(a) * eye, np.float32(b) * ones)


def _refusing():
    d = np.full(N, 1e-39, np.float32)
    op = cx.from_matvec(lambda v: d * v, N)
    return {
        "power": lambda: cx.power_iteration(op, seed=0),
        "sharpness": lambda: cx.sharpness(op),
        "trace": lambda: cx.trace(op, num_matvecs=10, seed=0),
        "exact": lambda: cx.trace(op, num_matvecs=N),
        "diagonal": lambda: cx.diagonal(op, num_matvecs=10, seed=0),
        "density": lambda: cx.spectral_density(op, num_steps=10, seed=0),
        "log_det": lambda: cx.log_det(op, num_steps=10, seed=0),
        "tridiagonal": lambda: cx.lanczos_tridiagonal(op, 5, seed=0),
        "full": lambda: cx.lanczos_tridiagonal(op, 5, seed=0, reorthogonalize=True),
        "solve": lambda: cx.solve(op, jnp.ones(N)),
    }


@pytest.mark.parametrize("name", list(_refusing()))
def test_numbers_read_as_zero_are_refused(name):
    with pytest.raises(FloatingPointError, match=r"underflows in float32.*power of two"):
        _refusing()[name]()


def test_float64():
    with jax.enable_x64(True):
        values = np.linspace(1, 2, 20)
        for size in (1e-300, 1e300):
            a = np.diag(values * size)
            np.testing.assert_allclose(cx.trace(a).estimate, values.sum() * size, rtol=1e-12)
            result = cx.trace(a, method="hutchinson", num_matvecs=10, distribution="gaussian")
            assert 0 < result.stderr < 100 * size
            np.testing.assert_allclose(cx.diagonal(a).estimate, values * size, rtol=1e-12)
            truth = np.sum(np.log(values)) + 20 * np.log(size)
            determinant = cx.log_det(a, num_steps=20, seed=0)
            assert determinant.interval[0] <= truth <= determinant.interval[1]
            power = cx.power_iteration(a, seed=0, tol=1e-2)
            np.testing.assert_allclose(power.eigenvalues / size, [2], rtol=1e-2)
            np.testing.assert_allclose(cx.solve(a, values * size).x, 1, rtol=1e-5)


class TestFiniteDifferences:
    def _op(self, factor):
        b = jnp.asarray(np.random.default_rng(0).normal(size=(30, 6)), jnp.float32)
        params = jnp.linspace(0.5, 1.5, 6)
        return cx.hessian(
            lambda p, b: factor * jnp.mean(jnp.tanh(b @ p) ** 2),
            params,
            b,
            method="finite_difference",
        )

    @pytest.mark.parametrize("exponent", [-80, 110])
    def test_the_step_and_its_error_are_those_of_any_scale(self, exponent):
        plain, scaled = self._op(1.0), self._op(2.0**exponent)
        assert scaled.relative_step == plain.relative_step
        np.testing.assert_allclose(scaled.relative_error, plain.relative_error, rtol=1e-3)
        assert plain.relative_error > 1e-5
        expected = cx.eigsh(plain, 2, seed=0, tol=1e-2)
        result = cx.eigsh(scaled, 2, seed=0, tol=1e-2)
        np.testing.assert_allclose(
            result.eigenvalues / 2.0**exponent, expected.eigenvalues, rtol=1e-5
        )

    def test_gradients_whose_differences_vanish_are_refused(self):
        with pytest.raises(FloatingPointError, match=r"differences underflow.*power of two"):
            self._op(1e-34)
        # The loss itself is read as zero, by jax 0.10 in more of its operations than by 0.12.
        with pytest.raises(FloatingPointError, match=r"underflow.*power of two"):
            cx.eigsh(self._op(1e-37), 1)

    def test_a_linear_loss_has_none(self):
        op = cx.hessian(
            lambda p, b: jnp.mean(b @ p), jnp.ones(4), jnp.ones((2, 4)), method="finite_difference"
        )
        np.testing.assert_array_equal(cx.eigsh(op, 1, seed=0).eigenvalues, 0)


def test_host_operators():
    a = scipy.sparse.csr_array(_matrix(1e-37))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Entries below the smallest normal number, which XLA's threads read as zero.
        with pytest.raises(FloatingPointError, match="underflows"):
            cx.trace(a, num_matvecs=10, seed=0)
    a = scipy.sparse.csr_array(np.diag(np.linspace(3, 4, N)) * np.float32(1e-37)).astype(np.float32)
    result = cx.trace(a, num_matvecs=N)
    np.testing.assert_allclose(result.estimate, 3.5 * N * 1e-37, rtol=1e-5)
