"""`cdf`, `quantile` and their intervals against the eigenvalues of dense matrices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.results.fake_results import fake_density
from tests.results.test_distribution import SPECTRA, points

import curvax as cx

SIZE, SEEDS = 400, 200


@functools.lru_cache
def operator(name):
    """A diagonal float32 operator, and its eigenvalues in float64."""
    values = jnp.asarray(SPECTRA[name], jnp.float32)
    return cx.from_matvec(lambda v: values * v, SIZE), np.asarray(values, np.float64)


def densities(op, runs, steps, **options):
    """As of `SEEDS` seeds: the runs of one call, a few at a time."""
    options = {"seed": 1, "block_size": 32} | options
    whole = cx.spectral_density(op, num_runs=runs * SEEDS, num_steps=steps, **options)
    for part in np.arange(runs * SEEDS).reshape(SEEDS, runs):
        kept = {name: getattr(whole, name)[part] for name in ("nodes", "weights", "residuals")}
        yield dataclasses.replace(whole, **kept)


def fractions(values, x):
    return np.searchsorted(np.sort(values), x, "right") / len(values)


def check_coverage(results, values, x):
    """The intervals of fractions at each point, and of quantiles, hold the truth in 95 %."""
    truth, parts = fractions(values, x), np.array([0.05, 0.5, 0.9])
    quantiles = np.sort(values)[np.ceil(parts * len(values) - 1e-9).astype(int) - 1]
    held, found = [], []
    for seed, result in enumerate(results):
        low, high = result.cdf_interval(x)
        held.append((low <= truth) & (truth <= high))
        if seed < 6:
            middle = result.cdf(x)
            assert np.all((low <= middle) & (middle <= high))
            assert np.diff(middle).min() >= -1e-12
            (first, last), middle = result.quantile_interval(parts), result.quantile(parts)
            assert np.all((first <= middle) & (middle <= last))
            found.append((first <= quantiles) & (quantiles <= last))
    # Two in a thousand of samples of 200 hold less, where 95 % is exact.
    assert np.mean(held, axis=0).min() >= 0.905, (x, np.mean(held, axis=0))
    assert np.mean(held) >= 0.94 and np.mean(found) >= 0.8


@pytest.mark.parametrize(
    "name, runs, steps",
    [
        pytest.param(name, runs, steps, marks=() if (name, runs, steps) in chosen else slow)
        for chosen, slow in [
            (
                {("near zero", 1, 10), ("half zeros", 3, 30), ("indefinite", 10, 30)},
                pytest.mark.slow,
            )
        ]
        for name in SPECTRA
        for runs, steps in [(1, 10), (3, 30), (10, 30), (2, 80)]
    ],
)
def test_intervals_hold_the_truth(name, runs, steps):
    op, values = operator(name)
    check_coverage(densities(op, runs, steps), values, points(values))


@pytest.mark.parametrize("tol", [pytest.param(1e-5, marks=pytest.mark.slow), 1e-2])
def test_intervals_hold_the_truth_beside_pairs_left_out(tol):
    """Whose vectors are as good as `tol`, so that what the runs see is moved."""
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    full = (basis * SPECTRA["indefinite"]) @ basis.T
    a = np.asarray((full + full.T) / 2, np.float32)
    values = np.linalg.eigvalsh(a.astype(np.float64))
    pairs = cx.eigsh(a, 3, which="LA", tol=tol, seed=0)
    results = list(densities(a, 3, 30, deflate=pairs))
    assert results[0].coupling == pytest.approx(np.linalg.norm(pairs.residuals), rel=0.3)
    check_coverage(results, values, np.unique(np.append(points(values), values[-4:] + 1e-4)))
    # What was left out is known: between two of them, and their neighbours, nothing is open.
    apart = (values[-1] + values[-2]) / 2
    assert results[0].cdf(apart) == np.mean(values <= apart)
    low, high = results[0].cdf_interval(apart)
    assert low == high == np.mean(values <= apart)


class TestAroundZero:
    def test_nothing_of_a_positive_matrix_is_below(self):
        op, values = operator("positive")
        result = cx.spectral_density(op, seed=0, num_steps=80)
        assert np.mean(values <= 0) == 0 and values.min() <= 1.1e-4 * values.max()
        low, high = result.cdf_interval(0.0)
        assert low == 0 and high < 0.02 and result.cdf(0.0) < 0.01
        # Fewer steps cannot tell half of the eigenvalues, at 1e-4, from zero: they say so.
        low, high = cx.spectral_density(op, seed=0, num_steps=8).cdf_interval(0.0)
        assert low == 0 and high > 0.4

    def test_zeros_are_at_zero_and_not_below(self):
        """To rounding: at zero both readings are left open."""
        op, values = operator("half zeros")
        result = cx.spectral_density(op, seed=0)
        near = 1e-4 * values.max()
        assert result.rounding == 10 * np.finfo(np.float32).eps * np.nanmax(np.abs(result.nodes))
        low, high = result.cdf_interval([-near, 0.0, near])
        assert high[0] < 0.01 and low[1] <= 0.01 and high[1] >= 0.5
        assert low[2] <= 0.5 <= high[2] and high[2] - low[2] < 0.06
        # What is seen of the starts, within 1.96 standard deviations of half.
        assert abs(result.cdf(near) - 0.5) < 1.96 * np.sqrt(2 / 4 / (10 * SIZE))
        assert abs(result.quantile(0.3)) <= 2 * result.rounding
        # Of fewer others, zero is resolved to rounding.
        result = cx.spectral_density(operator("low rank")[0], seed=0)
        assert "below 0     0.0000, 95 % in [0.0000, 0.0000]" in str(result)
        assert abs(result.cdf(0.0) - 0.95) < 0.02
        low, high = result.cdf_interval(0.0)
        assert low == 0 and high >= 0.95

    def test_a_node_in_the_middle_of_a_bulk(self):
        """With half of the mass: what it may be is said, whatever the number of runs."""
        op, values = operator("indefinite")
        truth = np.mean(values <= 0)
        few, many = (
            cx.spectral_density(op, seed=0, num_runs=100, num_steps=m, block_size=25)
            for m in (10, 80)
        )
        widths = []
        for result in (few, many):
            low, high = result.cdf_interval(0.0)
            assert low <= truth <= high
            widths.append(high - low)
        assert widths[0] > 0.5 and widths[1] < 0.35 and abs(many.cdf(0.0) - truth) < 0.02

    def test_losses(self):
        """The Hessian and the Gauss-Newton matrix of a network, of 40 outputs for 120 weights."""
        keys = jax.random.split(jax.random.key(0), 4)
        params = {
            "in": jax.random.normal(keys[0], (4, 20)) / 2,
            "out": jax.random.normal(keys[1], (20, 2)) / 4,
        }
        batch = jax.random.normal(keys[2], (20, 4)), jax.random.normal(keys[3], (20, 2))

        def outputs(p, data):
            return jnp.tanh(data[0] @ p["in"]) @ p["out"]

        loss = cx.losses.MeanSquaredError(lambda data: data[1])
        gauss_newton = cx.ggn(outputs, loss, params, batch)
        hessian = cx.hessian(lambda p, b: jnp.mean((outputs(p, b) - b[1]) ** 2), params, batch)
        for op in (gauss_newton, hessian):
            size = op.shape[0]
            dense = jax.lax.map(lambda v, op=op: op.ravel(op @ op.unravel(v)), jnp.eye(size))
            values = np.linalg.eigvalsh(np.asarray(dense, np.float64))
            result = cx.spectral_density(op, seed=0, num_runs=20, num_steps=60, block_size=20)
            x = np.append(np.quantile(values, [0.1, 0.4, 0.7, 0.95]), [0.0, -1e-4, 1e-4])
            low, high = result.cdf_interval(x)
            assert np.all((low <= fractions(values, x)) & (fractions(values, x) <= high))
            if op is gauss_newton:
                assert low[-3] == 0 and ", 95 % in [0.0000, " in str(result)


class TestWhatIsKept:
    def test_residuals_bound_the_distance_to_an_eigenvalue(self):
        op, values = operator("decaying")
        result = cx.spectral_density(op, seed=0, num_runs=3, num_steps=25)
        distance = np.abs(result.nodes[..., None] - values).min(axis=-1)
        assert np.all(distance <= result.residuals + result.rounding)
        assert result.residuals.min() < 1e-3 * result.residuals.max()

    def test_interrupted_runs_are_no_invariant_subspaces(self):
        """Though both have fewer nodes than steps."""
        op, values = operator("uniform")
        whole = cx.spectral_density(op, seed=0, num_runs=2, num_steps=10)
        cut = {
            name: np.append(getattr(whole, name), np.full((2, 30), np.nan), axis=1)
            for name in ("nodes", "weights", "residuals")
        }
        cut = dataclasses.replace(whole, num_steps=40, interrupted=True, **cut)
        for one, other in zip(cut.cdf_interval(0.3), whole.cdf_interval(0.3), strict=True):
            assert one == other
        low, high = whole.cdf_interval(0.3)
        assert high - low > 0.1
        same = cx.spectral_density(cx.identity(jnp.zeros(SIZE, jnp.float32)), seed=0)
        np.testing.assert_array_equal(same.cdf_interval([0.5, 1.5]), [[0, 1], [0, 1]])

    def test_pairs_that_are_coupled_to_the_rest(self):
        """By 0.1: what is seen at 0 may be as far as 0.0123 from there, and the atom 0.2 from 1."""
        exact = fake_density([[0.0, 0.5]], [[0.5, 0.5]], [1.0], n=11)
        loose = dataclasses.replace(exact, coupling=0.1)
        assert exact.cdf_interval(-0.01)[1] == 0 and loose.cdf_interval(-0.01)[1] > 0.2
        assert loose.cdf_interval(-0.02)[1] == 0
        assert exact.cdf_interval(0.01)[0] > 0 and loose.cdf_interval(0.01)[0] == 0
        assert exact.cdf_interval(0.9) == loose.cdf_interval(0.79) == (10 / 11, 10 / 11)
        assert loose.cdf_interval(0.9) == loose.cdf_interval(1.1) == (10 / 11, 1)

    def test_results_without_residuals_say_so(self):
        op, _ = operator("uniform")
        old = cx.spectral_density(op, seed=0, num_runs=2, num_steps=10)
        old = dataclasses.replace(old, residuals=None)
        for call in (old.cdf, old.cdf_interval, old.quantile, old.quantile_interval):
            with pytest.raises(ValueError, match="no residuals.*compute it again"):
                call(0.5)
        assert "width" in str(old) and "below 0" not in str(old)

    def test_points_that_are_none(self):
        result = cx.spectral_density(operator("uniform")[0], seed=0, num_runs=2, num_steps=10)
        with pytest.raises(ValueError, match="x must hold numbers, got"):
            result.cdf([0.0, np.nan])
        for q in (0.0, 1.0, -0.1, 1.5, np.nan, [0.5, 1.0]):
            for call in (result.quantile, result.quantile_interval):
                with pytest.raises(ValueError, match="q must lie strictly between 0 and 1, got"):
                    call(q)
        # Of one step a quantile may be this many standard deviations off, or further than is told.
        poor = dataclasses.replace(
            result,
            nodes=result.nodes[:1, :1],
            weights=np.ones((1, 1)),
            residuals=np.full((1, 1), 30.0),
        )
        assert poor.quantile_interval(1 - 1e-9)[1] == np.inf
        assert poor.quantile_interval(1e-9)[0] == -np.inf


class TestNumSteps:
    """No more are made than the space has dimensions, by any of the three."""

    @pytest.mark.parametrize("more", [0, 1, 50])
    def test_above_n(self, more):
        a = np.diag(np.arange(1.0, 7)).astype(np.float32)
        density = cx.spectral_density(a, num_runs=2, num_steps=6 + more, seed=0)
        assert density.num_steps == 6 and density.nodes.shape == (2, 6)
        np.testing.assert_allclose(density.nodes, [np.arange(1.0, 7)] * 2, rtol=1e-5)
        assert density.num_matvecs == 12
        logarithm = cx.log_det(a, num_runs=2, num_steps=6 + more, seed=0)
        assert logarithm.num_matvecs == 12
        tridiagonal = cx.lanczos_tridiagonal(a, 6 + more, seed=0)
        assert tridiagonal.num_matvecs == 6 and len(tridiagonal.alphas) == 6

    def test_less_the_pairs_left_out(self):
        a = np.diag(np.arange(1.0, 7)).astype(np.float32)
        pairs = cx.eigsh(a, 2, which="LA", seed=0, tol=1e-6)
        made = set()
        for steps in (4, 5, 6, 80):
            density = cx.spectral_density(a, num_runs=2, num_steps=steps, deflate=pairs, seed=0)
            assert density.num_steps == 4 and density.nodes.shape == (2, 4)
            again = cx.log_det(a, num_runs=2, num_steps=steps, deflate=pairs, seed=0)
            made.add((density.num_matvecs, again.num_matvecs))
        assert len(made) == 1

    def test_the_fewest(self):
        a = np.diag(np.arange(1.0, 7)).astype(np.float32)
        for steps in (0, 1):
            with pytest.raises(ValueError, match=f"num_steps must be at least 2, got {steps}"):
                cx.spectral_density(a, num_steps=steps)
        assert len(cx.lanczos_tridiagonal(a, 1, seed=0).alphas) == 1
        with pytest.warns(cx.ConvergenceWarning, match="raise num_steps"):
            assert cx.log_det(a, num_runs=2, num_steps=1, seed=0).num_matvecs == 2
