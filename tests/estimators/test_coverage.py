"""The stated 95 % intervals hold the truth in 90 to 99 % of runs, over 200 seeds."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import stdtrit
from tests.krylov.spectra import N, matrix

import curvax as cx
from curvax.operators.conversion import as_operator

SEEDS = range(200)
OPTIONS = {"num_matvecs": 60, "block_size": 10}


def _spectrum(name):
    if name == "decaying":
        return 1 / np.arange(1, N + 1)
    return np.concatenate([[1000, 500, 200, 100, 50], np.random.default_rng(0).uniform(size=N - 5)])


@functools.lru_cache
def _operator(name):
    """In float32, and the matrix that this stands for."""
    if name in ("decaying", "heavy bulk"):
        q, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(N, N)))
        a = (q * _spectrum(name)) @ q.T
    else:
        a = matrix(name.removesuffix(" squared"))
        a = a @ a if name.endswith("squared") else a
    a = jnp.asarray((a + a.T) / 2, jnp.float32)
    return as_operator(a), np.asarray(a, np.float64)


def _check_trace(name, method, **options):
    op, a = _operator(name)
    truth = np.trace(a)
    results = [cx.trace(op, method=method, seed=s, **OPTIONS, **options) for s in SEEDS]
    errors = np.array([result.estimate - truth for result in results])
    stderr = np.array([result.stderr for result in results])
    held = np.mean([result.interval[0] <= truth <= result.interval[1] for result in results])
    return held, errors, stderr


def _assert_honest(held, errors, stderr):
    assert 0.9 <= held <= 0.99
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(len(errors))
    # The stated variance is unbiased.
    assert 0.8 < np.sqrt(np.mean(stderr**2) / np.mean(errors**2)) < 1.25


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace", "xnystrace"])
def test_trace(method):
    """Where single estimates of a sketch are most correlated: their spectrum decays."""
    _assert_honest(*_check_trace("decaying", method))


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("name", ["heavy bulk", "outliers", "both signs", "decaying"])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_trace_of_every_spectrum(name, method, distribution):
    _assert_honest(*_check_trace(name, method, distribution=distribution))


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["rademacher", "sphere"])
@pytest.mark.parametrize("name", ["heavy bulk", "outliers squared", "decaying"])
def test_xnystrace_of_every_spectrum(name, distribution):
    _assert_honest(*_check_trace(name, "xnystrace", distribution=distribution))


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "xnystrace"])
def test_what_is_left_to_rounding(method):
    """The operator has the rank 7, so that no sample shows an error."""
    name = "low rank" if method != "xnystrace" else "low rank squared"
    op, a = _operator(name)
    for seed in range(40):
        result = cx.trace(op, method=method, seed=seed, **OPTIONS)
        low, high = result.interval
        assert low <= np.trace(a) <= high
        assert high - low < 1e-3 * np.linalg.norm(a)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
def test_stopping_at_a_standard_error(method):
    """A small standard error stops sooner, so intervals are a little too short."""
    op, a = _operator("decaying")
    options = {"method": method, "until": 0.15, "block_size": 10}
    results = [cx.trace(op, seed=seed, **options) for seed in SEEDS]
    held = np.mean([r.interval[0] <= np.trace(a) <= r.interval[1] for r in results])
    assert 0.87 <= held <= 0.99


def _check_diagonal(name, method, distribution):
    op, a = _operator(name)
    options = {"method": method, "distribution": distribution}
    results = [cx.diagonal(op, seed=seed, **OPTIONS, **options) for seed in SEEDS]
    errors = np.array([np.asarray(r.estimate, np.float64) - np.diag(a) for r in results])
    stderr = np.array([np.asarray(r.stderr, np.float64) for r in results])
    dof = results[0].num_samples - 1
    held = np.abs(errors) <= stdtrit(dof, 0.975) * stderr
    assert 0.9 <= held.mean() <= 0.99
    # Nor is it the mean of good and bad: over seeds for every entry, over entries for every seed.
    # Of 200, 0.95 ± 0.015; of 160 entries, which share their probes, a little more.
    assert held.mean(axis=0).min() > 0.86
    assert held.mean(axis=1).min() > 0.8
    assert np.all(np.abs(errors.mean(axis=0)) < 5 * errors.std(axis=0) / np.sqrt(len(SEEDS)))
    ratio = np.sqrt(np.mean(stderr**2, axis=0) / np.mean(errors**2, axis=0))
    assert 0.75 < ratio.min() and ratio.max() < 1.35
    # The sizes of standardised errors are distributed as those of Student's t, out to the tails.
    scores = np.abs(errors / stderr)
    for p in (0.3, 0.5, 0.7, 0.9, 0.99):
        found = np.mean(scores < stdtrit(dof, (1 + p) / 2))
        assert abs(found - p) < 0.1 * (1 - p) + 0.01


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_diagonal(method):
    _check_diagonal("decaying", method, "rademacher")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heavy bulk", "outliers", "both signs"])
@pytest.mark.parametrize(
    "method, distribution",
    [
        ("hutchinson", "rademacher"),
        ("hutchinson", "gaussian"),
        ("hutchinson", "sphere"),
        ("xdiag", "rademacher"),
    ],
)
def test_diagonal_of_every_spectrum(name, method, distribution):
    _check_diagonal(name, method, distribution)


def test_diagonal_left_to_rounding():
    op, a = _operator("low rank")
    held = []
    for seed in range(20):
        result = cx.diagonal(op, method="xdiag", seed=seed, **OPTIONS)
        error = np.abs(np.asarray(result.estimate, np.float64) - np.diag(a))
        quantile = stdtrit(result.num_samples - 1, 0.975)
        held.append(np.mean(error <= quantile * np.asarray(result.stderr)))
    assert np.mean(held) > 0.95
