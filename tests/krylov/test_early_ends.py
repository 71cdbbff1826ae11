"""What ends a solve before its time: Ctrl-C, broken operators, wrong arguments."""

import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from tests.krylov.spectra import N, matrix, operator

import curvax as cx

EPS = float(np.finfo(np.float32).eps)


class TestInterrupt:
    def test_ctrl_c_returns_what_is_known(self):
        def press(progress):
            if progress.matvecs == 12:
                os.kill(os.getpid(), signal.SIGINT)

        before = signal.getsignal(signal.SIGINT)
        options = {"which": "LA", "seed": 0, "max_basis": 60, "tol": 1e-7}
        with pytest.warns(cx.InterruptWarning):
            result = cx.eigsh(operator(), 4, **options, callback=press)
        assert result.interrupted and not result.converged.any()
        assert (result.num_matvecs, result.num_verification) == (12, 0)
        assert np.isnan(result.residuals).all() and np.isfinite(result.estimated_errors).all()
        # Twelve products do find the largest.
        np.testing.assert_allclose(result.eigenvalues[0], 20, rtol=1e-2)
        assert signal.getsignal(signal.SIGINT) is before

    @pytest.mark.parametrize("block", [1, 3])
    def test_what_had_converged_is_measured(self, block):
        """By a product each; the others are not verified."""
        seen = []

        def press(progress):
            if progress.converged >= 2 and not seen:
                seen.append(progress.converged)
                os.kill(os.getpid(), signal.SIGINT)

        options = {"which": "LA", "max_basis": 60, "block_size": block, "seed": 0}
        with pytest.warns(cx.InterruptWarning):
            result = cx.eigsh(operator(), 8, callback=press, **options)
        measured = np.isfinite(result.residuals)
        assert result.interrupted and seen[0] <= measured.sum() < 8
        assert result.num_verification == measured.sum() + (-measured.sum()) % block
        small = result.residuals[measured] <= result.tol_effective[measured] * 20.001
        assert np.all(result.converged[measured] <= small)
        assert not result.converged[~measured].any()
        truth = np.linalg.norm(
            np.asarray(result.eigenvectors, np.float64) @ matrix("outliers")
            - result.eigenvalues[:, None] * np.asarray(result.eigenvectors, np.float64),
            axis=1,
        )
        np.testing.assert_allclose(
            result.residuals[measured], truth[measured], rtol=1e-2, atol=200 * EPS * 20
        )

    def test_before_k_columns(self):
        def press(progress):
            if progress.matvecs == 2:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.warns(cx.InterruptWarning):
            result = cx.eigsh(operator(), 6, seed=0, max_basis=60, callback=press)
        assert result.interrupted and result.eigenvalues.shape == (2,)

    def test_twice_raises(self):
        def press(progress):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            cx.eigsh(operator(), 6, seed=0, max_basis=60, callback=press)


class TestBadOperators:
    def test_not_symmetric(self):
        a = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
        op = cx.from_matvec(lambda v: a @ v, N)
        with pytest.raises(
            ValueError, match=r"A must be symmetric: at product \d+ .*is [012]\.?\d*"
        ):
            cx.eigsh(op, 3, seed=0, max_basis=60)
        with pytest.raises(ValueError, match="A must be symmetric"):
            cx.eigsh(op, 3, seed=0, max_basis=N)

    @pytest.mark.parametrize("basis", [60, N])
    def test_not_finite_names_the_product_and_the_leaf(self, basis):
        a = jnp.asarray(matrix("outliers"), jnp.float32)

        def matvec(tree):
            v = jnp.concatenate([tree["good"], tree["bad"]])
            out = a @ v
            return {"good": out[:100], "bad": out[100:] * jnp.where(jnp.arange(60) < 2, jnp.nan, 1)}

        like = {"good": np.ones(100, np.float32), "bad": np.ones(60, np.float32)}
        with pytest.raises(FloatingPointError, match=r"product 1 .*in: bad"):
            cx.eigsh(cx.from_matvec(matvec, like), 3, seed=0, max_basis=basis)


@pytest.mark.parametrize(
    "k, kwargs, error, message",
    [
        (0, {}, ValueError, "k must be between 1 and n = 160, got 0"),
        (161, {}, ValueError, "between 1 and n = 160, got 161"),
        (2.0, {}, TypeError, "k must be an integer"),
        (True, {}, TypeError, "k must be an integer"),
        ((2, 2), {}, TypeError, "needs which='BE'"),
        ((2, -1), {"which": "BE"}, ValueError, "not be negative"),
        ((2, 1, 1), {"which": "BE"}, TypeError, "pair"),
        (2, {"which": "XX"}, ValueError, "which must be one of LM, LA, SA, BE, got 'XX'"),
        (2, {"which": "SM"}, ValueError, "inside the spectrum"),
        (2, {"tol": -1}, ValueError, "tol"),
        (2, {"tol": float("nan")}, ValueError, "tol"),
        (2, {"tol": "small"}, TypeError, "tol"),
        (2, {"block_size": 0}, ValueError, "block_size"),
        (2, {"block_size": 99}, ValueError, "block_size must be at most 32"),
        (2, {"block_size": 1.5}, TypeError, "block_size"),
        (2, {"block_size": "big"}, ValueError, "block_size"),
        (5, {"max_basis": 6}, ValueError, "max_basis must be at least k . 4.block_size = 9, got 6"),
        (5, {"max_matvecs": 4}, ValueError, "max_matvecs must be at least 5, got 4"),
        (2, {"seed": -1}, ValueError, "seed"),
        (2, {"seed": 1.5}, TypeError, "seed"),
        (2, {"certify": "maybe"}, ValueError, "certify"),
        (2, {"callback": 3}, TypeError, "callback"),
        (2, {"basis_dtype": np.float64}, ValueError, "basis_dtype"),
        (2, {"basis_dtype": "short"}, ValueError, "one of float32, float16, .*got 'short'"),
        (2, {"basis_dtype": 3}, ValueError, "basis_dtype must be one of .*'auto'; got 3"),
        (2, {"block_size": None}, TypeError, "block_size must be 'auto', 'tune' or an integer"),
        (2, {"return_eigenvectors": "yes"}, TypeError, "return_eigenvectors must be True or"),
        (2, {"v0": np.zeros(N)}, ValueError, "v0 must be finite and not zero"),
        (2, {"v0": np.full(N, np.nan)}, ValueError, "v0 must be finite"),
        (2, {"v0": np.ones(N + 1)}, ValueError, r"shape \(160,\), got \(161,\)"),
        (2, {"v0": []}, TypeError, "v0"),
    ],
)
def test_bad_arguments(k, kwargs, error, message):
    with pytest.raises(error, match=message):
        cx.eigsh(operator(), k, **kwargs)
