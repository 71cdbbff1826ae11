"""How often the stated 95 % intervals hold the truth: in 90 to 99 % of 200 seeds, everywhere."""

import functools

import numpy as np
import pytest
import scipy.stats

import curvax as cx

N, SEEDS = 300, 200
MIDPOINTS = (np.arange(N) + 0.5) / N

SPECTRA = {
    # Ends sharply, with isolated eigenvalues of mass 1/n on both sides.
    "bulk and outliers": np.concatenate([np.linspace(-1, 1, N - 4), [3, 6, 9, -4]]),
    # A bulk far narrower than its distance from the outliers.
    "narrow bulk": np.concatenate([1e-3 * scipy.stats.norm.ppf(MIDPOINTS[3:]), [20, 50, 100]]),
    # Most of the mass on one eigenvalue.
    "low rank": np.concatenate([np.zeros(N - 20), np.linspace(1, 20, 20)]),
    # All scales.
    "decaying": 1 / (1 + np.arange(N)),
}


@functools.lru_cache
def matrix(name):
    """A float32 matrix in a random basis, and its eigenvalues in float64."""
    basis, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(N, N)))
    full = (basis * SPECTRA[name]) @ basis.T
    a = np.asarray((full + full.T) / 2, np.float32)
    return a, np.linalg.eigvalsh(a.astype(np.float64))


def assert_covers(hits, what):
    """`hits (seeds, points)`."""
    share = np.mean(hits, axis=0)
    assert np.all((share >= 0.90) & (share <= 0.99)), (what, share)


def check_density(name, **options):
    """The density, smoothed as by default, at fixed points."""
    a, values = matrix(name)
    options = {"num_runs": 10, "num_steps": 40, "block_size": 10} | options
    width = cx.spectral_density(a, seed=SEEDS, **options).width
    x = np.unique(np.append(np.quantile(values, [0.05, 0.2, 0.5, 0.8, 0.95]), values[[0, -3, -1]]))
    z = (x[:, None] - values) / width
    density = scipy.stats.norm.pdf(z).mean(axis=1) / width
    hits = []
    for seed in range(SEEDS):
        result = cx.spectral_density(a, width=width, seed=seed, **options)
        _, lower, upper = result.evaluate(x)
        hits.append((lower <= density) & (density <= upper))
    assert_covers(hits, "density")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x != "narrow bulk" else x for x in SPECTRA]
)
def test_density(name):
    check_density(name)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("name", SPECTRA)
def test_density_from_few_runs(name, runs):
    check_density(name, num_runs=runs, block_size=runs)


@pytest.mark.slow
def test_density_beside_known_eigenvalues():
    name = "bulk and outliers"
    a, values = matrix(name)
    pairs = cx.eigsh(a, 3, which="LA", tol=1e-5, seed=0)
    options = {"num_runs": 10, "num_steps": 40, "block_size": 10, "deflate": pairs}
    width = cx.spectral_density(a, seed=SEEDS, **options).width
    x = np.quantile(values, [0.0, 0.05, 0.2, 0.5, 0.8, 0.95])
    density = scipy.stats.norm.pdf((x[:, None] - values) / width).mean(axis=1) / width
    hits = []
    for seed in range(SEEDS):
        result = cx.spectral_density(a, width=width, seed=seed, **options)
        _, lower, upper = result.evaluate(x)
        hits.append((lower <= density) & (density <= upper))
    assert_covers(hits, "density")


@pytest.mark.parametrize(
    "name, options",
    [
        ("bulk and outliers", {"damping": 5.0, "num_runs": 2}),
        pytest.param("low rank", {"damping": 0.1, "num_runs": 10}, marks=pytest.mark.slow),
        pytest.param("decaying", {"damping": 1e-3, "num_runs": 10}, marks=pytest.mark.slow),
    ],
)
def test_log_det(name, options):
    a, values = matrix(name)
    truth = np.sum(np.log(values + options["damping"]))
    hits = []
    for seed in range(SEEDS):
        low, high = cx.log_det(a, seed=seed, block_size=options["num_runs"], **options).interval
        hits.append([low <= truth <= high])
    assert_covers(hits, "log_det")
