"""What `tol` is relative to, the tolerance of each value, and the noise that may raise it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from tests.krylov.spectra import diagonal, wanted

import curvax as cx

# Two large eigenvalues, a negative end of a 350th of them, and a bulk that touches it.
TWO_SCALES = np.concatenate(
    [[13.4, 12.8, -0.0378, -0.0336, -0.0323], -0.03 + 0.033 * np.linspace(0, 1, 1995) ** 2]
)


def _spectra():
    rng = np.random.default_rng(1)
    power = 10 / np.arange(1, 60) ** 1.2
    return {
        "psd": 10 / np.arange(1, 801) ** 1.5,
        "psd bulk": np.concatenate([power, 0.02 * np.abs(rng.normal(size=741)) ** 3]),
        "low rank": np.concatenate([power, np.zeros(741)]),
        "hessian": np.concatenate(
            [13 * 0.8 ** np.arange(20), -3 * 0.8 ** np.arange(10), 0.05 * rng.normal(size=770)]
        ),
        "network": np.concatenate(
            [
                13.4 / np.arange(1, 40) ** 1.2,
                -0.4 / np.arange(1, 20) ** 0.7,
                0.003 * rng.standard_t(3, size=742),
            ]
        ),
    }


class TestEnds:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_small_low_end_is_as_accurate_as_the_high_one(self, seed):
        result = cx.eigsh(diagonal(TWO_SCALES), (2, 3), which="BE", seed=seed)
        assert result.all_converged
        np.testing.assert_allclose(result.eigenvalues, wanted(TWO_SCALES, (2, 3), "BE"), rtol=3e-3)
        # Relative to |λ|max: the high end by tol, the low by tol times its share of that.
        parts = [1e-3, 1e-3, *[1e-3 * 0.0378 / 13.4] * 3]
        np.testing.assert_allclose(result.tol_effective, parts, rtol=1e-2)
        assert np.all(result.relative_bounds < 1.3e-3)
        np.testing.assert_allclose(
            result.relative_bounds, result.bounds / np.abs(result.eigenvalues)
        )

    def test_relative_to_the_largest_is_what_it_was(self):
        result = cx.eigsh(diagonal(TWO_SCALES), (2, 3), which="BE", seed=0, relative_to="largest")
        assert result.all_converged and np.all(result.tol_effective == 1e-3)
        assert result.bounds.max() > 1e-3 * 0.0378  # which says little of the low end

    @pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
    @pytest.mark.parametrize("rows", [30, 200])  # iterated, and dense
    def test_relative_to_each(self, which, rows):
        values = np.concatenate([[20.0, 3, 0.5], np.linspace(-0.02, 0.02, 75), [-0.3, -4]])
        result = cx.eigsh(
            diagonal(values), 5, which=which, relative_to="each", seed=0, max_basis=rows,
            certify="complete",
        )  # fmt: skip
        truth = wanted(values, 5, which)
        floor = np.maximum(1e-3 * np.abs(truth) / 20, 1e-6)
        assert result.all_converged
        np.testing.assert_allclose(result.eigenvalues, truth, rtol=3e-3, atol=3e-6 * 20)
        np.testing.assert_allclose(result.tol_effective, floor, rtol=2e-2)

    @pytest.mark.parametrize("which", ["SA", "BE"])
    @pytest.mark.parametrize("name", _spectra())
    def test_the_cost(self, name, which):
        """At most half as many products more than relative to the largest, without a warning."""
        values = _spectra()[name]
        op, k = diagonal(values), 6
        new = cx.eigsh(op, k, which=which, seed=0)
        old = cx.eigsh(op, k, which=which, seed=0, relative_to="largest")
        assert new.all_converged
        assert new.num_matvecs <= 1.5 * old.num_matvecs
        if values.min() >= 0:  # zero within its bound
            low = new.eigenvalues[-1]
            assert abs(low) <= max(new.bounds[-1], 1e-6 * values.max())
        else:
            np.testing.assert_allclose(new.eigenvalues[-1], values.min(), rtol=1e-3)

    def test_a_definite_end_has_a_value(self):
        values = np.concatenate([[50.0, 20], np.linspace(0.3, 5, 298)])
        result = cx.eigsh(diagonal(values), 2, which="SA", seed=0)
        np.testing.assert_allclose(result.tol_effective, 1e-3 * 0.3 / 50, rtol=1e-2)
        np.testing.assert_allclose(result.eigenvalues, wanted(values, 2, "SA"), rtol=1e-3)

    def test_a_hidden_negative_end_shows_relative_to_each(self):
        """At the bound of a semidefinite matrix it looks like one."""
        values = np.concatenate([[1000.0, 50, -0.01, -0.009], np.linspace(-0.005, 1, 600)])
        loose = cx.eigsh(diagonal(values), (1, 2), which="BE", seed=0)
        assert np.all(np.abs(loose.eigenvalues[1:]) <= 2 * loose.bounds[1:])
        strict = cx.eigsh(diagonal(values), (1, 2), which="BE", seed=0, relative_to="each")
        np.testing.assert_allclose(strict.eigenvalues[1:], [-0.009, -0.01], atol=1e-3)

    def test_zero_is_zero(self):
        result = cx.eigsh(diagonal(np.zeros(300)), 3, which="BE", seed=0)
        assert result.all_converged and np.all(result.relative_bounds == 0)

    def test_another_word_is_refused(self):
        with pytest.raises(ValueError, match=r"relative_to must be one of \('largest', 'end', 'ea"):
            cx.eigsh(diagonal(TWO_SCALES), 2, relative_to="value")


class TestNoise:
    def test_large_residuals_are_no_noise(self):
        """Ended far from convergence, in float64: the products are good to rounding."""
        values = np.concatenate([[100.0, 80], np.linspace(0, 60, 1998)])
        with jax.enable_x64(True), warnings.catch_warnings():
            warnings.simplefilter("ignore", cx.ConvergenceWarning)
            result = cx.eigsh(
                diagonal(values, np.float64), 6, which="LA", tol=1e-12, max_matvecs=30, seed=0
            )
        assert result.residuals.max() > 0.1 and not result.all_converged
        assert result.noise < 3e-15
        assert np.all(result.tol_effective <= 1.0000001e-12)

    @pytest.mark.filterwarnings("ignore::curvax.ConvergenceWarning")
    @pytest.mark.parametrize("certify", ["residuals", "complete"])
    def test_a_drifting_operator_is_noisy(self, certify):
        """It changes by a thousandth with each product: no pair of it is an eigenpair."""
        values, made = np.concatenate([[10.0, 9, 8], np.linspace(-1, 1, 297)]), [0]

        def drifting(v):
            made[0] += 1
            return values * v + 1e-3 * made[0] * np.roll(values, 1) * v

        op = scipy.sparse.linalg.LinearOperator((300, 300), drifting, dtype=np.float32)
        result = cx.eigsh(op, 3, certify=certify, seed=0, max_matvecs=200)
        assert result.noise > 0.1 * result.residuals.max() / 10
        assert result.noise > 1e-3

    @pytest.mark.parametrize("certify", ["residuals", "sampled"])
    def test_noise_is_measured_as_large_as_it_is(self, certify):
        """A symmetric matrix whose products are rounded to eight bits."""
        rng = np.random.default_rng(2)
        basis, _ = np.linalg.qr(rng.normal(size=(200, 200)))
        matrix = jnp.asarray((basis * np.linspace(-5, 20, 200)) @ basis.T, jnp.float32)

        def matvec(v):
            return (matrix @ v).astype(jnp.bfloat16).astype(jnp.float32)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cx.ConvergenceWarning)
            result = cx.eigsh(
                cx.from_matvec(matvec, 200), 3, tol=1e-6, certify=certify, seed=0, max_basis=60
            )
        # Rounding a product of length 20 to eight bits: 2⁻⁹ / √3 of it, root mean square.
        assert 0.3 * 2**-9 / np.sqrt(3) < result.noise < 5 * 2**-9
