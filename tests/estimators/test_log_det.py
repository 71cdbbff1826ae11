"""Log-determinants against eigenvalues in float64."""

import dataclasses
import math
import os
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator
from tests.estimators.references import drawn

import curvax as cx
from curvax.estimators.quadrature import gauss, radau

EPS = float(np.finfo(np.float32).eps)
N = 200


def positive(condition, seed=0):
    """A matrix of a given condition, its eigenvalues spread evenly over the decades."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))
    full = (basis * np.geomspace(1 / condition, 1, N)) @ basis.T
    return np.asarray((full + full.T) / 2, np.float32)


def truth(a, damping=0.0):
    return np.sum(np.log(np.linalg.eigvalsh(np.asarray(a, np.float64)) + damping))


class TestEstimate:
    @pytest.mark.parametrize("condition", [10, 100, 1000])
    def test_samples_are_those_of_the_starts(self, condition):
        """n zᵀ log(A) z of every start, from the eigenvectors in float64."""
        a = positive(condition)
        result = cx.log_det(a, num_runs=4, num_steps=60, seed=3)
        values, vectors = np.linalg.eigh(a.astype(np.float64))
        starts = drawn(N, 4, 3, "gaussian")
        masses = (starts @ vectors) ** 2 / np.sum(starts**2, axis=1, keepdims=True)
        samples = N * masses @ np.log(values)
        np.testing.assert_allclose(result.samples, samples, rtol=0, atol=2e-4 * N)
        np.testing.assert_allclose(result.estimate, samples.mean(), rtol=0, atol=2e-4 * N)
        # The variance of uniform starts, which four samples would not give.
        stderr = N * np.sqrt(2 * np.log(values).var() / (N + 2) / 4)
        np.testing.assert_allclose(result.stderr, stderr, rtol=0.2)
        assert result.method == "lanczos" and result.distribution == "sphere"
        assert result.interval[0] < result.estimate < result.interval[1]

    @pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
    def test_a_multiple_of_the_identity_at_any_scale(self, scale):
        a = np.asarray(scale * np.eye(N), np.float32)
        result = cx.log_det(a, num_runs=2, seed=0)
        np.testing.assert_allclose(result.estimate, N * np.log(scale), rtol=0, atol=3 * EPS * N)
        low, high = result.interval
        assert low <= N * np.log(scale) <= high < low + 10 * EPS * N
        assert result.num_matvecs == 2 and result.stderr < EPS * N

    def test_damping_is_added_to_every_eigenvalue(self):
        a = positive(100)
        plain = cx.log_det(a + 0.5 * np.eye(N, dtype=np.float32), num_runs=3, seed=0)
        damped = cx.log_det(a, damping=0.5, num_runs=3, seed=0)
        np.testing.assert_allclose(plain.samples, damped.samples, rtol=0, atol=1e-4 * N)
        zero = cx.log_det(np.zeros((3, 3), np.float32), damping=2, num_runs=2)
        np.testing.assert_allclose(zero.estimate, 3 * np.log(2), rtol=1e-6)

    def test_an_indefinite_matrix_may_be_damped(self):
        a = positive(100) - 0.3 * np.eye(N, dtype=np.float32)
        result = cx.log_det(a, damping=0.5, num_steps=60, seed=0)
        assert result.interval[0] < truth(a, 0.5) < result.interval[1]

    def test_float64(self):
        with jax.enable_x64(True):
            a = np.diag(np.geomspace(1e-2, 1, N))
            result = cx.log_det(a, num_runs=3, num_steps=80, seed=0)
            starts = drawn(N, 3, 0, "gaussian", dtype=np.float64)
        masses = starts**2 / np.sum(starts**2, axis=1, keepdims=True)
        np.testing.assert_allclose(result.samples, N * masses @ np.log(np.diag(a)), atol=1e-10)

    def test_one_run_has_an_interval(self):
        result = cx.log_det(positive(100), num_runs=1, seed=0)
        assert 0 < result.stderr < np.inf and len(result.samples) == 1

    def test_progress_is_kept(self):
        result = cx.log_det(positive(100), num_runs=5, num_steps=20, block_size=2, seed=0)
        assert [entry.matvecs for entry in result.history] == [40, 80, 100]
        assert {entry.max_matvecs for entry in result.history} == {100}
        assert result.history[-1].estimate == result.estimate
        np.testing.assert_allclose(result.history[0].estimate, result.samples[:2].mean())
        assert result.num_matvecs == 100 and result.block_size == 2


class TestDeflation:
    def test_the_known_part_is_exact(self):
        a = np.diag(np.concatenate([np.full(N - 4, 2.0), [1e3, 300, 200, 100]])).astype(np.float32)
        pairs = cx.eigsh(a, 4, seed=0, tol=1e-6, max_basis=40)
        result = cx.log_det(a, deflate=pairs, num_runs=2, seed=0)
        np.testing.assert_allclose(result.estimate, truth(a), rtol=0, atol=5 * EPS * N)
        assert result.num_deflated == 4
        assert result.stderr < EPS * N < 1 < cx.log_det(a, num_runs=2, seed=0).stderr

    def test_it_lowers_the_error(self):
        values = np.concatenate([np.linspace(1, 2, N - 10), np.geomspace(1e3, 1e5, 10)])
        a = np.diag(values).astype(np.float32)
        pairs = cx.eigsh(a, 10, seed=0, tol=1e-4, max_basis=60)
        plain, result = (cx.log_det(a, deflate=d, seed=1) for d in (None, pairs))
        assert result.stderr < 0.2 * plain.stderr
        assert abs(result.estimate - truth(a)) < 4 * result.stderr

    def test_pairs_of_a_nearby_operator(self):
        """Their values are measured anew; the rest, a multiple of the identity, has no error."""
        with jax.enable_x64(True):
            a = np.diag(np.concatenate([[1e3, 300.0], np.ones(N - 2)]))
            pairs = cx.eigsh(a, 2, seed=0, tol=1e-9, max_basis=20)
            pairs = dataclasses.replace(pairs, residuals=np.full(2, 1.0))
            result = cx.log_det(1.001 * a, deflate=pairs, num_runs=2, seed=0)
        low, high = result.interval
        assert low <= truth(1.001 * a) <= high < low + 1e-6

    @pytest.mark.parametrize("angle", [0.03, 0.1])
    def test_residuals_widen_the_interval(self, angle):
        """The logarithm of both parts is too large by what couples them, in second order."""
        a = np.diag(np.concatenate([[10.0, 8.0], np.ones(N - 2)])).astype(np.float32)
        x = np.zeros((2, N), np.float32)
        x[[0, 1], [0, 1]], x[[0, 1], [2, 3]] = np.cos(angle), np.sin(angle)
        quotients = np.sum(x * (x @ a), axis=1)
        residuals = np.linalg.norm(x @ a - quotients[:, None] * x, axis=1)
        pairs = dataclasses.replace(
            cx.eigsh(a, 2, seed=0), eigenvectors=x, eigenvalues=quotients, residuals=residuals
        )
        with pytest.warns(cx.ConvergenceWarning, match="too large by .* pairs that were solved"):
            result = cx.log_det(a, deflate=pairs, num_runs=400, block_size=20, seed=0)
        low, high = result.interval
        # The rest is 1 in all but two directions: its estimate is close.
        assert result.estimate - truth(a) > 3 * (high - result.estimate)
        assert low < truth(a) and result.estimate - low < 1.5 * (result.estimate - truth(a))

    def test_a_known_eigenvalue_that_is_not_positive(self):
        a = np.diag([3.0, 2.0, 1.5, 1.2, -4.0]).astype(np.float32)
        pairs = cx.eigsh(a, 1, seed=0)
        with pytest.raises(ValueError, match="it has a Ritz value of -4"):
            cx.log_det(a, deflate=pairs)


class TestSteps:
    def test_gauss_and_radau_enclose_the_integral(self):
        """Of the same start, at any number of steps, and ever closer."""
        values = np.geomspace(1e-3, 1, N)
        start = np.random.default_rng(0).normal(size=N)
        start /= np.linalg.norm(start)
        integral = start**2 @ np.log(values)
        rows, alphas, betas = [start], [], []
        gaps = []
        for _ in range(40):
            w = values * rows[-1]
            alphas.append(rows[-1] @ w)
            for _ in range(2):
                w -= np.transpose(rows) @ (np.asarray(rows) @ w)
            betas.append(np.linalg.norm(w))
            rows.append(w / betas[-1])
            pair = np.asarray(alphas), np.asarray(betas)
            above, below = gauss(*pair), radau(*pair, 0.9e-3)
            assert below.nodes[0] == pytest.approx(0.9e-3)
            assert below.weights.sum() == pytest.approx(1)
            # Exact for polynomials of degree 2m, as of one more than Gauss quadrature.
            for degree in (1, 2, 2 * len(alphas)):
                assert below.weights @ below.nodes**degree == pytest.approx(
                    start**2 @ values**degree, rel=1e-9
                )
            low, high = (q.weights @ np.log(q.nodes) for q in (below, above))
            assert low < integral < high
            gaps.append(high - low)
        assert np.all(np.diff(gaps) < 0) and gaps[-1] < 1e-2 * gaps[0]

    def test_radau_adds_nothing_where_the_space_is_invariant(self):
        pair = np.asarray([1.75, 1.25]), np.asarray([math.sqrt(3) / 4, 0.0])
        np.testing.assert_allclose(gauss(*pair).nodes, [1, 2])
        again = radau(*pair, 0.5)
        np.testing.assert_allclose(again.nodes, [0.5, 1, 2])
        np.testing.assert_allclose(again.weights, [0, 0.25, 0.75], atol=1e-15)

    @pytest.mark.parametrize("condition, damping", [(1e4, 0.0), (1e5, 0.0), (1e6, 1e-4)])
    def test_too_few_for_the_condition_are_never_silent(self, condition, damping):
        """The interval reaches the truth, which 1.96 standard errors do not."""
        a = np.diag(np.geomspace(1 / condition, 1, N)).astype(np.float32)
        with pytest.warns(cx.ConvergenceWarning, match="may be too large by .* raise num_steps"):
            result = cx.log_det(a, damping=damping, num_runs=200, num_steps=8, block_size=20)
        assert truth(a, damping) < result.estimate - 4 * result.stderr
        assert result.interval[0] < truth(a, damping) < result.interval[1]

    def test_enough_give_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = cx.log_det(positive(1000), num_steps=60, seed=0)
        np.testing.assert_allclose(np.ptp(result.interval), 2 * 1.96 * result.stderr, rtol=0.05)


class TestDefiniteness:
    def test_an_indefinite_matrix_is_refused_with_a_damping_that_would_do(self):
        a = positive(100) - 0.3 * np.eye(N, dtype=np.float32)
        with pytest.raises(ValueError, match=r"damping=0 it has a Ritz value of -0\.") as caught:
            cx.log_det(a, seed=0)
        damping = float(str(caught.value).split("damping=")[-1].split(",")[0])
        result = cx.log_det(a, damping=damping, num_runs=4, num_steps=N, seed=0)
        assert result.interval[0] < truth(a, damping) < result.interval[1]

    @pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
    def test_a_singular_matrix_is_refused(self, scale):
        factors = np.random.default_rng(0).normal(size=(N, 20))
        a = np.asarray(scale * factors @ factors.T / N, np.float32)
        with pytest.raises(ValueError, match="must be positive definite, but with damping=0 it"):
            cx.log_det(a, num_runs=2, seed=0)
        damped = cx.log_det(a, damping=0.1 * scale, num_runs=20, seed=0)
        low, high = damped.interval
        assert low < truth(a, 0.1 * scale) < high

    def test_a_zero_eigenvalue_that_rounding_makes_positive_is_refused(self):
        a = np.diag([0.0, 1.0, 2.0, 3.0]).astype(np.float32)
        for seed in range(10):
            with pytest.raises(ValueError, match="must be positive definite"):
                cx.log_det(a, num_runs=1, seed=seed)

    def test_the_zero_matrix(self):
        with pytest.raises(ValueError, match="it has a Ritz value of 0"):
            cx.log_det(np.zeros((3, 3), np.float32))


class TestSeeds:
    def test_the_same_bits_and_blocks_alike(self):
        a = positive(100)
        first, again = (cx.log_det(a, num_runs=4, seed=7) for _ in range(2))
        np.testing.assert_array_equal(first.samples, again.samples)
        blocks = cx.log_det(a, num_runs=4, seed=7, block_size=3)
        np.testing.assert_allclose(blocks.samples, first.samples, rtol=0, atol=1e-4 * N)

    def test_a_drawn_one_is_recorded(self):
        a = positive(100)
        drawn_ = cx.log_det(a, num_runs=2)
        assert cx.log_det(a, num_runs=2, seed=drawn_.seed).estimate == drawn_.estimate


@pytest.mark.parametrize("at, runs, steps", [(4, 1, 4), (25, 2, 10)])
def test_ctrl_c_keeps_the_finished_runs(at, runs, steps):
    """Or, if there is none, those under way."""
    a, calls = positive(10), []

    def matvec(v):
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return a @ v

    op = LinearOperator((N, N), matvec=matvec, dtype=np.float32)
    with pytest.warns(cx.InterruptWarning):
        result = cx.log_det(op, num_runs=5, num_steps=10, seed=0, block_size=1)
    assert result.interrupted and len(result.samples) == runs and result.num_matvecs == at
    whole = cx.log_det(a, num_runs=runs, num_steps=steps, seed=0)
    np.testing.assert_allclose(result.samples, whole.samples, rtol=0, atol=1e-4 * N)


def test_not_finite():
    with pytest.raises(FloatingPointError, match=r"product 1 of the operator is not finite"):
        cx.log_det(cx.from_matvec(lambda v: v * jnp.inf, 5), block_size=1)


def test_unconverged_pairs():
    pairs = cx.eigsh(positive(10), 2, seed=0)
    poor = dataclasses.replace(pairs, converged=np.asarray([True, False]))
    with pytest.raises(ValueError, match="deflate must hold converged pairs, but 1 of 2"):
        cx.log_det(positive(10), deflate=poor)


def test_traced():
    with pytest.raises(TypeError, match="log_det runs on the host: call it outside"):
        jax.jit(lambda a: cx.log_det(a).estimate)(jnp.eye(4))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"damping": -1}, ValueError, "damping must be finite and not negative, got -1"),
        ({"damping": float("inf")}, ValueError, "damping must be finite"),
        ({"damping": "1"}, TypeError, "damping must be a number, got '1'"),
        ({"num_runs": 0}, ValueError, "num_runs must be at least 1, got 0"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": True}, TypeError, "num_steps must be an integer"),
        ({"block_size": 99}, ValueError, "block_size must be at most n = 4, got 99"),
        ({"seed": -3}, ValueError, "seed"),
        ({"deflate": 3}, TypeError, "deflate must be an EigenResult"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        cx.log_det(np.eye(4, dtype=np.float32), **options)
