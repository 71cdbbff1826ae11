"""Spectral densities against closed forms, and how `spectral_density` behaves."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.sparse.linalg import LinearOperator
from tests.estimators.references import drawn
from tests.krylov.spectra import SPECTRA, N, matrix

import curvax as cx
from curvax.estimators import quadrature
from curvax.results import SpectralDensity

EPS = float(np.finfo(np.float32).eps)

LARGE = 2000


@functools.lru_cache
def diagonal(*outliers):
    """A normal bulk of standard deviation 1e-3, and outliers; and the eigenvalues in float64."""
    size = LARGE - len(outliers)
    bulk = 1e-3 * scipy.stats.norm.ppf((np.arange(size) + 0.5) / size)
    values = jnp.asarray(np.concatenate([bulk, outliers]), jnp.float32)
    return cx.from_matvec(lambda v: values * v, LARGE), np.asarray(values, np.float64)


@functools.lru_cache
def dense(name):
    return jnp.asarray(matrix(name), jnp.float32)


@functools.lru_cache
def density(name, **options):
    options = {"seed": 0, "num_runs": 4, "num_steps": 60} | options
    return cx.spectral_density(dense(name), **options)


def smoothed(values, x, width):
    """The density of eigenvalues at x, smoothed."""
    return scipy.stats.norm.pdf((np.asarray(x)[:, None] - values) / width).mean(axis=1) / width


def assert_consistent(result, n):
    """What every density must satisfy."""
    nodes = result.nodes[~np.isnan(result.nodes)]
    places = np.append(nodes, result.atoms)
    assert np.all(np.diff(result.grid) > 0) and len(result.grid) <= 41_000
    assert result.grid[0] <= places.min() - 7.99 * result.width
    assert result.grid[-1] >= places.max() + 7.99 * result.width
    assert abs(np.trapezoid(result.density, result.grid) - 1) < 1e-6
    assert np.all(result.lower <= result.density) and np.all(result.density <= result.upper)
    for ours, again in zip(
        (result.density, result.lower, result.upper), result.evaluate(result.grid), strict=True
    ):
        np.testing.assert_array_equal(ours, again)
    np.testing.assert_allclose(np.nansum(result.weights, axis=1), 1, rtol=1e-12)
    assert np.all(np.diff(result.nodes, axis=1)[:, : nodes.size // len(result.nodes) - 1] >= 0)
    assert result.num_parameters == n and np.all(np.diff(result.outliers) <= 0)
    assert result.num_deflated == len(result.atoms)


class TestQuadrature:
    @pytest.mark.thin(4)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_each_run_is_the_measure_of_its_start(self, name):
        """Against the masses of the same starts on the eigenvectors, in float64."""
        result = density(name)
        starts = drawn(N, 4, 0, "gaussian")
        values, vectors = np.linalg.eigh(np.asarray(dense(name), np.float64))
        masses = (starts @ vectors) ** 2 / np.sum(starts**2, axis=1, keepdims=True)
        scale = np.abs(values).max() or 1.0
        x = np.linspace(-1.2, 1.2, 100)[:, None] * scale
        for nodes, weights, mass in zip(result.nodes, result.weights, masses, strict=True):
            there = ~np.isnan(nodes)
            for width in (0.3, 0.1, 0.05):
                ours = np.exp(-0.5 * ((x - nodes[there]) / width / scale) ** 2) @ weights[there]
                truth = np.exp(-0.5 * ((x - values) / width / scale) ** 2) @ mass
                np.testing.assert_allclose(ours, truth, rtol=0, atol=50 * EPS)

    @pytest.mark.parametrize("name", SPECTRA)
    def test_consistent_at_any_spectrum_and_scale(self, name):
        result = density(name)
        assert_consistent(result, N)
        assert result.nodes.shape == result.weights.shape == (4, 60) and result.num_steps == 60

    @pytest.mark.parametrize("name, value", [("identity", 1.0), ("zero", 0.0)])
    def test_one_eigenvalue_is_one_node(self, name, value):
        result = density(name)
        np.testing.assert_allclose(result.nodes[:, 0], value, rtol=2 * EPS)
        np.testing.assert_array_equal(result.weights[:, 0], 1)
        assert np.isnan(result.nodes[:, 1:]).all() and np.isnan(result.weights[:, 1:]).all()
        assert result.num_matvecs == 4 and not result.outliers.size

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_no_more_than_n_steps(self, n):
        a = np.diag(np.arange(1.0, n + 1)).astype(np.float32)
        result = cx.spectral_density(a, num_runs=3, seed=0)
        assert_consistent(result, n)
        assert result.num_steps == n and result.num_matvecs <= 3 * n
        assert result.cdf(n + 0.5) > 1 - 1e-9

    def test_float64(self):
        with jax.enable_x64(True):
            result = cx.spectral_density(matrix("outliers"), num_runs=4, num_steps=60, seed=0)
        values, vectors = np.linalg.eigh(matrix("outliers"))
        starts = drawn_in_float64(4)
        masses = (starts @ vectors) ** 2 / np.sum(starts**2, axis=1, keepdims=True)
        moments = np.sum(result.weights * (result.nodes / 20) ** 3, axis=1)
        np.testing.assert_allclose(moments, masses @ (values / 20) ** 3, rtol=0, atol=1e-14)


def drawn_in_float64(count):
    with jax.enable_x64(True):
        return drawn(N, count, 0, "gaussian", dtype=np.float64)


class TestWidth:
    def test_a_narrow_bulk_beside_outliers_is_resolved(self):
        op, values = diagonal(100.0, 50.0, 20.0)
        result = cx.spectral_density(op, seed=0)
        assert result.width < 0.3e-3
        np.testing.assert_allclose(result.outliers, [100, 50, 20], rtol=1e-5)
        x = np.linspace(-4e-3, 4e-3, 161)
        truth = smoothed(values, x, result.width)
        mean, lower, upper = result.evaluate(x)
        assert np.mean((lower <= truth) & (truth <= upper)) >= 0.9
        assert np.abs(mean - truth).max() < 0.06 * truth.max()
        # The bulk without smoothing, which the range over the number of steps, 1.25, would hide.
        peak = scipy.stats.norm.pdf(0) / 1e-3
        assert abs(result.evaluate(0.0)[0] - peak) < 0.1 * peak
        hidden = dataclasses.replace(result, width=100 / 80)
        assert hidden.evaluate(0.0)[0] < 1e-3 * peak
        assert_consistent(result, LARGE)

    def test_the_bulk_sets_it_not_the_range(self):
        near, far = (
            cx.spectral_density(diagonal(*outliers)[0], seed=0, num_runs=4).width
            for outliers in ((0.02, 0.05, 0.1), (20.0, 50.0, 100.0))
        )
        assert far < 3 * near

    def test_it_scales_with_the_operator(self):
        small, large = (
            cx.spectral_density(scale * dense("outliers"), seed=0, num_runs=4, num_steps=60)
            for scale in (np.float32(2.0**-46), np.float32(2.0**46))
        )
        np.testing.assert_allclose(large.width / small.width, 2.0**92, rtol=1e-6)
        np.testing.assert_array_equal(small.weights, large.weights)

    def test_more_steps_resolve_more(self):
        op, _ = diagonal()
        widths = [cx.spectral_density(op, seed=0, num_runs=4, num_steps=m).width for m in (20, 80)]
        # The distance of the nodes falls as 1/√m for a normal distribution, as 1/m where it ends.
        assert 1.9 < widths[0] / widths[1] < 4.1

    @pytest.mark.parametrize("steps", [10, 40])
    def test_the_quadrature_error_is_below_the_sampling_error(self, steps):
        """On 20 times as many runs, so on a band a fifth as wide, most of the truth still lies."""
        op, values = diagonal()
        result = cx.spectral_density(op, seed=0, num_runs=200, num_steps=steps, block_size=25)
        x = np.linspace(-3e-3, 3e-3, 101)
        _, lower, upper = result.evaluate(x)
        truth = smoothed(values, x, result.width)
        assert np.mean((lower <= truth) & (truth <= upper)) >= 0.85

    @pytest.mark.parametrize("width", [1e-4, 0.3, 50.0])
    def test_a_given_one(self, width):
        result = density("outliers", width=width)
        assert result.width == width
        assert_consistent(result, N)

    @pytest.mark.parametrize("name", ["identity", "two values", "low rank"])
    def test_where_every_node_is_an_eigenvalue(self, name):
        np.testing.assert_allclose(density(name).width, 1e-3 * np.abs(SPECTRA[name]).max())

    def test_below_the_resolution_of_the_grid(self):
        with pytest.warns(cx.ConvergenceWarning, match="width=1e-16 .* 2e-12 was applied"):
            result = density("outliers", width=1e-16)
        np.testing.assert_allclose(result.width, 2e-12, rtol=1e-6)


class TestOutliers:
    @pytest.mark.parametrize("name", ["outliers", "both signs", "low rank", "repeated", "small"])
    def test_each_once(self, name):
        """What lies outside the bulk, by its quartiles; copies count as one."""
        values = SPECTRA[name]
        first, third = np.quantile(values, [0.25, 0.75])
        apart = 4 * (third - first) + 1e-3 * np.abs(values).max()
        truth = np.unique(values[(values > third + apart) | (values < first - apart)])[::-1]
        found = density(name, num_runs=10).outliers
        near = np.abs(found[:, None] - truth).min(axis=0)
        assert near.max() <= 20 * EPS * np.abs(values).max()
        assert np.abs(found[:, None] - values).min(axis=1).max() <= 20 * EPS * np.abs(values).max()
        assert np.diff(found).max() < -1e-3 * np.abs(values).max()

    def test_none_in_a_bulk(self):
        for op in (diagonal()[0], dense("identity"), dense("zero")):
            assert not cx.spectral_density(op, seed=0, num_runs=4).outliers.size


class TestDeflation:
    @functools.cached_property
    def pairs(self):
        return cx.eigsh(diagonal(100.0, 50.0, 20.0)[0], 3, seed=0, tol=1e-6)

    def test_atoms_are_exact_and_the_runs_see_the_rest(self):
        op, values = diagonal(100.0, 50.0, 20.0)
        plain, result = (
            cx.spectral_density(op, seed=0, num_runs=4, deflate=d) for d in (None, self.pairs)
        )
        assert_consistent(result, LARGE)
        np.testing.assert_array_equal(result.atoms, self.pairs.eigenvalues)
        np.testing.assert_allclose(result.outliers, [100, 50, 20], rtol=1e-6)
        # No node is spent on what is known, in the course of 80 steps.
        assert np.abs(result.nodes).max() < 5e-3
        assert result.width < 0.5 * plain.width
        # The mass of three of 2000 eigenvalues.
        np.testing.assert_allclose(result.cdf(10.0), 1 - 3 / LARGE, rtol=1e-12)
        np.testing.assert_allclose(result.cdf_interval(10.0), 1 - 3 / LARGE, rtol=1e-12)
        x = np.linspace(-3e-3, 3e-3, 81)
        truth = smoothed(values, x, result.width)
        _, lower, upper = result.evaluate(x)
        assert np.mean((lower <= truth) & (truth <= upper)) >= 0.85

    def test_copies_that_were_not_deflated_stay(self):
        a = dense("repeated")
        pairs = cx.eigsh(a, 1, seed=0, tol=1e-6, max_basis=40)
        result = cx.spectral_density(a, seed=0, num_runs=10, num_steps=60, deflate=pairs)
        np.testing.assert_allclose(result.outliers[:2], 10, rtol=1e-5)
        assert result.cdf(20.0) - result.cdf(9.0) > 2 / N

    def test_what_it_must_be(self):
        op = diagonal(100.0, 50.0, 20.0)[0]
        with pytest.raises(TypeError, match="deflate must be an EigenResult"):
            cx.spectral_density(op, deflate=np.eye(3))
        poor = dataclasses.replace(self.pairs, converged=np.asarray([True, False, True]))
        with pytest.raises(ValueError, match="deflate must hold converged pairs, but 1 of 3"):
            cx.spectral_density(op, deflate=poor)


class TestSeeds:
    def test_the_same_bits(self):
        a, b = (cx.spectral_density(dense("outliers"), seed=5, num_runs=2) for _ in range(2))
        for field in ("grid", "density", "lower", "upper", "nodes", "weights"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))

    def test_a_drawn_one_is_recorded(self):
        a = cx.spectral_density(dense("outliers"), num_runs=1)
        b = cx.spectral_density(dense("outliers"), num_runs=1, seed=a.seed)
        np.testing.assert_array_equal(a.nodes, b.nodes)
        assert cx.spectral_density(dense("outliers"), num_runs=1).seed != a.seed

    def test_run_i_depends_on_the_seed_and_i_alone(self):
        """Products of other blocks round otherwise; what a run's measure is stays."""
        options = {"num_steps": 15, "seed": 3}
        whole = cx.spectral_density(dense("outliers"), num_runs=5, **options)
        for other in (
            cx.spectral_density(dense("outliers"), num_runs=5, block_size=2, **options),
            cx.spectral_density(dense("outliers"), num_runs=8, block_size=8, **options),
        ):
            np.testing.assert_allclose(other.nodes[:5], whole.nodes, rtol=0, atol=1e-3)
            np.testing.assert_allclose(other.weights[:5], whole.weights, rtol=0, atol=1e-4)
        assert np.abs(whole.nodes[1:] - whole.nodes[0]).max() > 0.1


class TestMemory:
    @pytest.mark.parametrize("block", [1, 4])
    def test_two_blocks_between_products_whatever_the_steps(self, block):
        """Counted among the live arrays after each step; the product makes a third."""
        op, _ = diagonal()
        before = _vectors_alive()
        for steps in (10, 60):
            alive = []
            cx.spectral_density(
                op, num_runs=2 * block, num_steps=steps, block_size=block, seed=0,
                callback=lambda _, alive=alive: alive.append(_vectors_alive() - before),
            )  # fmt: skip
            assert len(alive) == 2 * steps and max(alive) <= 2 * block


def _vectors_alive():
    return sum(x.size // LARGE for x in jax.live_arrays() if x.size % LARGE == 0)


class TestCallback:
    def test_progress(self):
        seen = []
        cx.spectral_density(
            dense("outliers"), num_runs=3, num_steps=6, block_size=2, seed=0, callback=seen.append
        )
        assert [p.matvecs for p in seen] == [2, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17, 18]
        assert [p.runs for p in seen] == [0] * 5 + [2] * 6 + [3]
        assert {(p.max_matvecs, p.num_runs) for p in seen} == {(18, 3)}
        assert np.all(np.diff([p.seconds for p in seen]) >= 0)

    @pytest.mark.parametrize("at, runs, steps, products", [(4, 1, 4, 4), (25, 2, 10, 25)])
    def test_ctrl_c_keeps_the_finished_runs(self, at, runs, steps, products):
        """Or, if there is none, those under way."""

        def press(progress):
            if progress.matvecs == at:
                os.kill(os.getpid(), signal.SIGINT)

        options = {"num_runs": 5, "num_steps": 10, "seed": 0, "block_size": 1}
        whole = cx.spectral_density(dense("outliers"), **options)
        with pytest.warns(cx.InterruptWarning):
            result = cx.spectral_density(dense("outliers"), **options, callback=press)
        assert result.interrupted and not whole.interrupted
        assert result.nodes.shape == (runs, 10) and result.num_matvecs == products
        assert np.all(np.sum(~np.isnan(result.nodes), axis=1) == steps)
        if steps == 10:
            np.testing.assert_array_equal(result.nodes, whole.nodes[:2])
        assert_consistent(result, N)

    def test_ctrl_c_before_the_first_product(self, monkeypatch):
        """One step is made: no result is without a node."""

        def press(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return normalize(*arguments)

        normalize = quadrature.normalize
        monkeypatch.setattr(quadrature, "normalize", press)
        options = {"num_runs": 3, "num_steps": 10, "seed": 0, "block_size": 1}
        with pytest.warns(cx.InterruptWarning):
            result = cx.spectral_density(dense("outliers"), **options)
        assert result.interrupted and result.num_matvecs == 1
        assert_consistent(result, N)


def test_one_run_has_a_band():
    """From the known variance of uniform starts."""
    one, ten = density("outliers", num_runs=1), density("outliers", num_runs=10)
    bands = [
        np.subtract(*(dataclasses.replace(result, width=1.0).evaluate(0.0)[i] for i in (2, 1)))
        for result in (one, ten)
    ]
    assert 2.5 < bands[0] / bands[1] < 4


def test_operators_of_scipy():
    op = LinearOperator((N, N), matvec=lambda v: matrix("outliers") @ v, dtype=np.float32)
    result = cx.spectral_density(op, num_runs=2, num_steps=8, seed=0)
    again = cx.spectral_density(dense("outliers"), num_runs=2, num_steps=8, seed=0)
    np.testing.assert_allclose(result.nodes, again.nodes, rtol=0, atol=1e-4)


def test_not_finite_names_the_leaf():
    def matvec(tree):
        return {"good": tree["good"], "bad": tree["bad"] * jnp.nan}

    like = {"good": np.ones(3, np.float32), "bad": np.ones(4, np.float32)}
    with pytest.raises(FloatingPointError, match=r"product 1 of .*in: bad \(4 of 4\)"):
        cx.spectral_density(cx.from_matvec(matvec, like), num_runs=1)


def test_saved_and_loaded(tmp_path):
    result = density("outliers")
    result.save(tmp_path / "density")
    again = SpectralDensity.load(tmp_path / "density")
    np.testing.assert_array_equal(again.nodes, result.nodes)
    assert again.seconds == result.seconds and again.width == result.width


def test_traced():
    with pytest.raises(TypeError, match="spectral_density runs on the host: call it outside"):
        jax.jit(lambda a: cx.spectral_density(a).density)(jnp.eye(4))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_runs": 0}, ValueError, "num_runs must be at least 1, got 0"),
        ({"num_runs": 2.0}, TypeError, "num_runs must be an integer"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 2, got 0"),
        ({"num_steps": None}, TypeError, "num_steps must be an integer"),
        ({"width": 0}, ValueError, "width must be positive and finite, got 0"),
        ({"width": float("nan")}, ValueError, "width must be positive and finite"),
        ({"width": "auto"}, TypeError, "width must be a number, got 'auto'"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"block_size": "tune"}, ValueError, "block_size must be 'auto' or an integer"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"callback": 3}, TypeError, "callback must be callable"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        cx.spectral_density(np.eye(4, dtype=np.float32), **options)
