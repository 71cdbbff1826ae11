"""Bounds of masses and of fractions of eigenvalues, against dense matrices and closed forms."""

import numpy as np
import pytest
import scipy.linalg

from curvax.results.distribution import (
    displacement,
    fraction_interval,
    mass_bounds,
    mean_rule,
)


def lanczos(values, starts, steps, dtype=np.float64):
    """Runs of the plain recurrence on a diagonal matrix, as `(nodes, weights, residuals)`."""
    runs = np.full((3, len(starts), steps), np.nan)
    values = np.asarray(values, dtype)
    for run, start in zip(np.moveaxis(runs, 1, 0), starts, strict=True):
        previous, current, beta = np.zeros_like(start), start, 0.0
        alphas, betas = [], []
        for _ in range(steps):
            product = values * current
            alphas.append(float(product.astype(float) @ current.astype(float)))
            rest = product - dtype(beta) * previous - dtype(alphas[-1]) * current
            beta = float(np.linalg.norm(rest.astype(float)))
            scale = max(map(abs, [*alphas, *betas, beta]))
            betas.append(0.0 if beta <= 4 * np.finfo(dtype).eps * scale else beta)
            if betas[-1] == 0:
                break
            previous, current = current, rest / dtype(beta)
        nodes, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas[:-1], lapack_driver="stev")
        run[:, : len(nodes)] = nodes, vectors[0] ** 2, np.abs(betas[-1] * vectors[-1])
    return runs


def sphere(rng, runs, size, dtype=np.float64):
    starts = rng.normal(size=(runs, size))
    return (starts / np.linalg.norm(starts, axis=1, keepdims=True)).astype(dtype)


def spectra(size):
    """Ascending eigenvalues: what densities of losses look like, and what is hard."""
    rng = np.random.default_rng(3)
    half = size // 2
    found = {
        "near zero": [1e-3 * rng.uniform(0.01, 1, size - 5) ** 2, [0.2, 0.3, 0.5, 0.8, 1.0]],
        "half zeros": [np.zeros(half), rng.uniform(0.01, 1, size - half)],
        "low rank": [np.zeros(size - 20), np.linspace(0.1, 1, 20)],
        "positive": [1e-4 * rng.uniform(1, 1.1, half), rng.uniform(0.01, 1, size - half)],
        "indefinite": [0.02 * rng.laplace(size=size - 6), [-0.2, -0.1, 0.3, 0.4, 0.6, 1.0]],
        "uniform": [np.linspace(-1, 1, size)],
        "clusters": [1 + 1e-4 * rng.normal(size=half), -1 + 1e-2 * rng.normal(size=size - half)],
        "decaying": [1 / (1.0 + np.arange(size))],
    }
    return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}


SPECTRA = spectra(400)


def points(values):
    """Zero, quantiles, eigenvalues, gaps."""
    inner = np.quantile(values, [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
    gaps = (values[-1] + values[-2]) / 2, 2 * values[0] - values[1]
    near = np.abs(values).max() * np.array([-1e-3, -1e-5, 1e-5, 1e-3])
    return np.unique(np.concatenate([[0.0], inner, gaps, near, values[[0, 200, -2, -1]]]))


def extended(rule, x):
    """The bounds from the eigenvalues of T with one row more, in T's eigenbasis."""
    size = len(rule.nodes)
    x = x / rule.scale
    matrix = np.diag(np.append(rule.nodes, x + np.sum(rule.last**2 / (rule.nodes - x))))
    matrix[size, :size] = matrix[:size, size] = rule.last
    values, vectors = np.linalg.eigh(matrix)
    mass = np.append(0.0, np.cumsum((rule.first @ vectors[:size]) ** 2))
    before = np.sum(rule.nodes < x)
    assert abs(values[before] - x) < 1e-9
    return mass[before], mass[before + 1]


class TestMassBounds:
    @pytest.mark.parametrize("steps", [2, 30])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_they_are_the_sums_of_the_rule_with_a_node_there(self, rng, name, steps):
        values = 7.0 * SPECTRA[name]
        rule = mean_rule(*lanczos(values, sphere(rng, 2, len(values)), steps))
        x = points(values) + 1e-5
        expected = np.array([extended(rule, point) for point in x]).T
        np.testing.assert_allclose(mass_bounds(rule, x), expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("runs, steps", [(1, 150), (10, 60)])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_they_hold_the_masses_of_the_starts(self, rng, name, runs, steps, dtype):
        """Also where plain Lanczos has found many eigenvalues more than once."""
        values = SPECTRA[name].astype(dtype).astype(float)
        starts = sphere(rng, runs, len(values), dtype)
        rule = mean_rule(*lanczos(values, starts, steps, dtype))
        masses = starts.astype(float) ** 2
        masses = np.mean(masses / masses.sum(axis=1, keepdims=True), axis=0)
        x = np.unique(np.append(points(values), np.quantile(values, np.linspace(0, 1, 40))))
        truth = np.append(0.0, np.cumsum(masses))[np.searchsorted(values, x, "right")]
        eps = float(np.finfo(dtype).eps)
        lower, upper = mass_bounds(rule, x - 10 * eps)[0], mass_bounds(rule, x + 10 * eps)[1]
        slack = max(eps, 1e-9)
        assert np.all(lower <= truth + slack) and np.all(truth <= upper + slack)

    def test_one_step_is_the_inequality_of_cantelli(self, rng):
        values, start = rng.normal(size=50), sphere(rng, 1, 50)
        mean = start[0] ** 2 @ values
        variance = start[0] ** 2 @ (values - mean) ** 2
        x = mean + np.array([-30.0, -2.0, -0.1, 0.1, 2.0, 30.0])
        tail = variance / (variance + (x - mean) ** 2)
        lower, upper = mass_bounds(mean_rule(*lanczos(values, start, 1)), x)
        np.testing.assert_allclose(upper, np.where(x < mean, tail, 1.0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(lower, np.where(x < mean, 0.0, 1 - tail), rtol=0, atol=1e-12)

    def test_they_rise_and_close_with_the_steps(self, rng):
        values, starts = SPECTRA["indefinite"], sphere(rng, 3, 400)
        x = np.linspace(-1.5, 1.5, 301)
        widths = []
        for steps in (5, 20, 80):
            lower, upper = mass_bounds(mean_rule(*lanczos(values, starts, steps)), x)
            assert np.diff(lower).min() > -1e-9 and np.diff(upper).min() > -1e-9
            widths.append(np.mean(upper - lower))
        assert widths[0] > 1.5 * widths[1] > 2 * widths[2]

    @pytest.mark.parametrize("runs", [1, 3])
    def test_an_invariant_subspace_is_exact(self, rng, runs):
        values = np.repeat([-2.0, 0.0, 5.0], 4)
        starts = sphere(rng, runs, 12)
        quadratures = lanczos(values, starts, 9)
        assert np.isnan(quadratures[0][:, 3:]).all()
        lower, upper = mass_bounds(mean_rule(*quadratures), np.array([-3.0, -1.0, 1.0, 6.0]))
        masses = np.mean(starts**2, axis=0).reshape(3, 4).sum(axis=1)
        for bound in (lower, upper):
            np.testing.assert_allclose(bound, np.append(0, np.cumsum(masses)), rtol=0, atol=1e-12)

    def test_any_scale_and_any_point(self, rng):
        values, starts = SPECTRA["decaying"], sphere(rng, 2, 400)
        x = np.append(points(values), [-np.inf, np.inf, -1e6, 1e6])
        one = mass_bounds(mean_rule(*lanczos(values, starts, 20)), x)
        for power in (-200, 200):
            scale = 2.0**power
            other = mass_bounds(mean_rule(*lanczos(scale * values, starts, 20)), scale * x)
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-9)
        np.testing.assert_allclose(np.array(one)[:, -4:], [[0, 1] * 2] * 2, rtol=0, atol=1e-12)


class TestFractionInterval:
    @pytest.mark.parametrize(
        "size, count, runs",
        [(400, 133, 3), (400, 267, 1), (400, 380, 10), (400, 399, 3), (50, 25, 2), (10, 3, 3)],
    )
    def test_it_holds_the_fraction_in_95_percent_of_draws(self, rng, size, count, runs):
        masses = rng.beta(count / 2, (size - count) / 2, (4000, runs)).mean(axis=1)
        low, high = fraction_interval(masses, masses, size, runs)
        np.testing.assert_allclose(size * low, np.rint(size * low), rtol=0, atol=1e-9)
        held = np.mean((low <= count / size) & (count / size <= high))
        # Whole numbers: an interval of few of them holds more.
        assert 0.94 <= held <= 0.985
        above, below = np.mean(low > count / size), np.mean(high < count / size)
        assert max(above, below) <= 0.032

    @pytest.mark.parametrize("size", [1, 7, 10**6])
    def test_all_and_none_are_certain(self, size):
        low, high = fraction_interval(np.array([0.0, 1.0]), np.array([0.0, 1.0]), size, 2)
        np.testing.assert_array_equal([low, high], [[0, 1], [0, 1]])

    def test_what_the_quadrature_leaves_open_is_added(self):
        masses = np.array([0.0, 0.3, 0.6, 1.0])
        low, high = fraction_interval(masses[:-1], masses[1:], 1000, 5)
        tight = fraction_interval(masses, masses, 1000, 5)
        np.testing.assert_array_equal(low, tight[0][:-1])
        np.testing.assert_array_equal(high, tight[1][1:])


def test_eigenvalues_move_by_no_more_than_the_displacement(rng):
    """Of a matrix whose first block is coupled to the rest, and was taken for eigenvalues."""
    atoms, rest = np.array([10.0, 3.0, 2.0]), np.sort(rng.normal(size=40))
    for size in (1e-3, 1e-2, 0.1, 0.5):
        coupled = np.diag(np.append(atoms, rest))
        block = rng.normal(size=(43, 3))
        block = size * block / np.linalg.norm(block)
        coupled[:, :3] += block
        coupled[:3, 3:] = coupled[3:, :3].T
        coupled[:3, :3] = (coupled[:3, :3] + coupled[:3, :3].T) / 2
        values = np.linalg.eigvalsh(coupled)
        x = np.linspace(-3, 11, 2000)
        reach = displacement(x, atoms, size)
        count = np.searchsorted(values, x, "right")
        # No more are at or below x than are seen up to x + reach, and no fewer than x − reach.
        for sign, compare in ((1, np.less_equal), (-1, np.greater_equal)):
            seen = np.searchsorted(rest, x + sign * reach, "right")
            seen += np.searchsorted(np.sort(atoms), x + sign * 2 * size, "right")
            assert np.all(compare(count, seen))
    assert displacement(np.zeros(1), atoms, 1e-3)[0] < 1e-6
    assert displacement(np.zeros(1), atoms, 0.0)[0] == 0
