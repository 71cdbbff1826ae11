"""Smoothed spectral measures against closed forms of Gaussian mixtures."""

import math
import tracemalloc

import numpy as np
import pytest
from tests.results.fake_results import fake_density

from curvax.results import smoothing
from curvax.results.smoothing import smoothed_density

NAN = float("nan")
N, WIDTH, ATOMS = 50, 0.3, np.array([7.0, -4.0])


@pytest.fixture
def runs(rng):
    """Nodes and weights `(4, 6)`; of the last run two nodes are absent."""
    nodes = np.sort(rng.normal(size=(4, 6)), axis=1)
    weights = rng.dirichlet(np.ones(6), 4)
    nodes[3, 4:] = weights[3, 4:] = NAN
    weights[3, :4] /= weights[3, :4].sum()
    return nodes, weights


def mixture(part, x, nodes, weights):
    """The measure at one point, summed term by term; `part(z)` of a node z widths below x."""
    total = sum(part((x - atom) / WIDTH) for atom in ATOMS) / N
    for node, weight in zip(nodes.ravel(), weights.ravel(), strict=True):
        if not math.isnan(node):
            total += (1 - len(ATOMS) / N) * weight / len(nodes) * part((x - node) / WIDTH)
    return total


def normal_density(z):
    return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) / WIDTH


POINTS = np.concatenate([np.linspace(-6, 9, 40), ATOMS, [-1e6, 1e6]])


def test_the_mean_is_the_gaussian_mixture(runs):
    mean, lower, upper = smoothed_density(POINTS, *runs, ATOMS, N, WIDTH)
    exact = [mixture(normal_density, x, *runs) for x in POINTS]
    np.testing.assert_allclose(mean, exact, rtol=0, atol=1e-14)
    known = [sum(normal_density((x - atom) / WIDTH) for atom in ATOMS) / N for x in POINTS]
    assert np.all(lower >= np.array(known) - 1e-15)
    assert np.all(lower <= mean + 1e-13) and np.all(mean <= upper + 1e-13)


def test_a_result_evaluates_its_own_measure(runs):
    result = fake_density(*runs, ATOMS, n=N, width=WIDTH)
    for one, other in zip(
        result.evaluate(result.grid), (result.density, result.lower, result.upper), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_density_integrates_to_one(runs):
    result = fake_density(*runs, ATOMS, n=N, width=WIDTH)
    x = np.linspace(-4 - 9 * WIDTH, 7 + 9 * WIDTH, 20_001)
    assert abs(np.trapezoid(result.evaluate(x)[0], x) - 1.0) < 1e-10


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3), (0,)])
def test_shapes_are_those_of_the_points(runs, shape):
    result = fake_density(*runs, ATOMS, n=N, width=WIDTH)
    x = np.full(shape, 0.25)
    values = [*result.evaluate(x), result.cdf(x), *result.cdf_interval(x), result.quantile(x)]
    for value in [*values, *result.quantile_interval(x)]:
        assert value.shape == shape and value.dtype == np.float64
    assert isinstance(result.cdf(0), np.float64) and isinstance(result.quantile(0.5), float)


def test_a_run_without_nodes_is_left_out(runs):
    nodes, weights = (np.vstack([array, np.full(6, NAN)]) for array in runs)
    np.testing.assert_array_equal(
        smoothed_density(POINTS, nodes, weights, ATOMS, N, WIDTH),
        smoothed_density(POINTS, *runs, ATOMS, N, WIDTH),
    )


def test_a_measure_of_atoms_alone_is_exact():
    empty = np.empty((0, 3))
    mean, lower, upper = smoothed_density(POINTS, empty, empty, ATOMS, 2, WIDTH)
    exact = [sum(normal_density((x - atom) / WIDTH) for atom in ATOMS) / 2 for x in POINTS]
    np.testing.assert_allclose(mean, exact, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(lower, mean)
    np.testing.assert_array_equal(upper, mean)


@pytest.mark.parametrize("width", [0.0, -1.0, NAN])
def test_a_width_that_is_not_positive_is_refused(runs, width):
    with pytest.raises(ValueError, match="width.* must be > 0, got"):
        smoothed_density(0.0, *runs, ATOMS, N, width)


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="nodes has no run.*run at least one"):
        smoothed_density(0.0, np.full((1, 3), NAN), np.full((1, 3), NAN), ATOMS, N, WIDTH)


def test_chunks_do_not_change_the_numbers(runs, monkeypatch):
    whole = smoothed_density(POINTS, *runs, ATOMS, N, WIDTH)
    monkeypatch.setattr(smoothing, "_CHUNK", 7 * runs[0].size)
    np.testing.assert_allclose(smoothed_density(POINTS, *runs, ATOMS, N, WIDTH), whole, rtol=1e-15)


def test_memory_is_bounded_on_a_large_grid(rng):
    nodes = np.sort(rng.normal(size=(10, 80)), axis=1)
    weights = np.full((10, 80), 1 / 80)
    grid = np.linspace(-5, 5, 40_000)
    tracemalloc.start()
    smoothed_density(grid, nodes, weights, np.empty(0), 1000, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # 256 MB at once


@pytest.mark.parametrize("p, d", [(1, 400), (10, 60)])
def test_the_interval_covers_the_truth_in_95_percent_of_draws(rng, p, d):
    # Runs that have found all eigenvalues: what is left is the randomness of the starts.
    eigenvalues = np.append(np.sort(rng.normal(size=d - 1)), 6.0)
    x = np.array([-1.0, 0.1, 2.0, 6.0])
    uniform = np.full((1, d), 1 / d)
    empty = np.empty(0)
    truth = smoothed_density(x, eigenvalues[None], uniform, empty, d, 0.3)[0]
    hits = np.zeros(len(x))
    for _ in range(1000):
        weights = rng.chisquare(1, (p, d))
        weights /= weights.sum(axis=1, keepdims=True)
        nodes = np.broadcast_to(eigenvalues, (p, d))
        _, lower, upper = smoothed_density(x, nodes, weights, empty, d, 0.3)
        hits += (lower <= truth) & (truth <= upper)
    assert np.all(hits >= 900) and np.all(hits <= 990), hits
