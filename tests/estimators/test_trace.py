"""`trace`: against brute force on the same probes, exact cases, standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator
from tests.estimators import references
from tests.estimators.references import BLOCK, METHODS, PRODUCTS, SKETCHES, decaying, trace
from tests.krylov.spectra import SPECTRA, N, matrix

import curvax as cx
from curvax.device import probing
from curvax.estimators.arguments import ROUNDINGS
from curvax.memory import Memory
from curvax.program import Clock
from curvax.results import TraceProgress, TraceResult

EPS = float(np.finfo(np.float32).eps)

methods = pytest.mark.parametrize("method", METHODS)


class TestAgainstBruteForce:
    """In float64, where rounding leaves the algebra bare."""

    @staticmethod
    def _run(a, method, distribution, sketch, rest=0):
        """The result, the probes of the sketch, and the others."""
        with jax.enable_x64(True):
            result = cx.trace(
                a, method=method, num_matvecs=PRODUCTS, block_size=BLOCK, seed=0,
                distribution=distribution,
            )  # fmt: skip
            omega = references.drawn(N, sketch, 0, distribution, dtype=np.float64)
            first = references.INDEPENDENT
            z = references.drawn(N, max(rest, 1), 0, distribution, first, dtype=np.float64)
        assert result.num_matvecs == PRODUCTS and result.distribution == distribution
        return result, omega, z

    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
    def test_hutchinson(self, distribution):
        a = decaying()
        result, z, _ = self._run(a, "hutchinson", distribution, PRODUCTS)
        samples = np.sum(z * (z @ a), axis=1)
        np.testing.assert_allclose(result.samples, samples, rtol=1e-12)
        assert abs(result.estimate - samples.mean()) < 1e-12
        stderr = references.form_stderr(a, z, distribution)
        assert abs(result.stderr - stderr) < 1e-12 and result.no_interval == ""
        half = 2.0686576 * result.stderr  # Student's t, 23 degrees of freedom
        np.testing.assert_allclose(
            result.interval, [result.estimate - half, result.estimate + half], rtol=1e-6
        )

    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
    def test_hutch_plus_plus(self, distribution):
        a, k = matrix("both signs"), PRODUCTS // 3
        result, omega, z = self._run(a, "hutch++", distribution, k, k)
        estimate, samples, q = references.hutch_plus_plus(a, omega, z, distribution == "sphere")
        np.testing.assert_allclose(result.samples, samples, rtol=1e-9, atol=1e-9)
        assert abs(result.estimate - estimate) < 1e-9
        assert abs(result.stderr - references.form_stderr(a, z, distribution, q)) < 1e-9

    @pytest.mark.parametrize("distribution", ["rademacher", "sphere"])
    @pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
    def test_leave_one_out(self, method, distribution):
        a = matrix("both signs") if method == "xtrace" else decaying()
        k = PRODUCTS // 2 if method == "xtrace" else PRODUCTS
        result, omega, _ = self._run(a, method, distribution, k)
        brute, scaled = getattr(references, method), distribution == "sphere"
        estimates = brute(a, omega, scaled)
        np.testing.assert_allclose(result.samples, estimates, rtol=1e-9, atol=1e-9)
        assert abs(result.estimate - estimates.mean()) < 1e-9
        variance = getattr(references, f"{method}_variance")(a, omega, scaled)
        stderr = references.stderr(
            estimates, lambda j: brute(a, np.delete(omega, j, axis=0), scaled), variance
        )
        assert abs(result.stderr - stderr) < 1e-8


class TestExactCases:
    @pytest.mark.parametrize("method", SKETCHES)
    def test_low_rank(self, method):
        a = matrix("low rank")
        if method == "xnystrace":
            a = a @ a
        result = trace(a, method=method)
        scale = np.linalg.norm(a)
        # The Nyström form is shifted by what the roundings of the products may take from it.
        allowed = (100 if method == "xnystrace" else 8) * EPS * scale
        assert abs(result.estimate - np.trace(a)) < allowed
        low, high = result.interval
        assert low <= np.trace(a) <= high and high - low < 10 * allowed

    @methods
    def test_zero(self, method):
        result = trace(np.zeros((N, N)), method=method)
        assert result.estimate == 0 and result.stderr == 0 and result.interval == (0, 0)

    def test_an_exact_trace_allows_for_what_cancels(self):
        """Products of size 1 with entries of the diagonal that are zero but for rounding."""
        a = np.full((N, N), 1 / N)
        np.fill_diagonal(a, 0)
        result = cx.trace(a.astype(np.float32), num_matvecs=N)
        low, high = result.interval
        assert result.estimate == 0 and 0 < high - low < 1e-4

    def test_signs_are_exact_on_diagonal_operators(self):
        values = jnp.asarray(SPECTRA["outliers"], jnp.float32)
        result = trace(cx.from_matvec(lambda v: values * v, N), method="hutchinson")
        truth = float(np.sum(np.asarray(values, np.float64)))
        assert abs(result.estimate - truth) < 1e-12 * abs(truth) and result.stderr < 1e-12
        low, high = result.interval
        assert low < truth < high
        assert high - low < 2.01 * ROUNDINGS * EPS * np.linalg.norm(SPECTRA["outliers"])

    @pytest.mark.parametrize("method", ["auto", *SKETCHES])
    def test_n_products_suffice(self, method):
        a = matrix("outliers").astype(np.float32)
        result = cx.trace(a, method=method, num_matvecs=N)
        assert abs(result.estimate - np.trace(a.astype(np.float64))) < EPS * np.trace(a)
        assert result.stderr == 0 and result.num_matvecs == N and result.method == "exact"

    def test_unless_samples_are_asked_for(self):
        sampled = trace(matrix("outliers"), method="hutchinson", num_matvecs=N)
        assert sampled.method == "hutchinson" and sampled.stderr > 0

    @methods
    def test_scales(self, method):
        unit = trace(decaying(), method=method)
        for scale in (1e-14, 1e14):
            result = trace(scale * decaying(), method=method)
            assert abs(result.estimate / scale - unit.estimate) < 1e-4
            assert abs(result.stderr / scale - unit.stderr) < 1e-3 * unit.stderr

    @methods
    def test_float64(self, method):
        """A change of 1e-9 of the operator is seen."""
        options = {"method": method, "num_matvecs": PRODUCTS, "block_size": BLOCK, "seed": 0}
        with jax.enable_x64(True):
            a = decaying()
            results = [cx.trace(x, **options) for x in (a + 1e-9 * np.eye(N), a)]
        difference = results[0].estimate - results[1].estimate
        assert abs(difference - N * 1e-9) < 0.2 * N * 1e-9
        with pytest.raises(ValueError, match="64-bit mode is off"):
            cx.trace(decaying())


class TestStatistics:
    @pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
    def test_block_size_changes_nothing_but_roundings(self, method):
        one, several = (trace(decaying(), method=method, block_size=b) for b in (7, BLOCK))
        np.testing.assert_allclose(one.samples, several.samples, rtol=1e-3, atol=1e-4)
        assert abs(one.estimate - several.estimate) < 1e-4 * one.estimate
        assert abs(one.stderr - several.stderr) < 1e-3 * one.stderr
        assert one.num_matvecs == several.num_matvecs == PRODUCTS and one.block_size == 7

    @methods
    def test_seeds(self, method):
        a = decaying()
        first, again, other = (trace(a, method=method, seed=seed) for seed in (5, 5, 6))
        np.testing.assert_array_equal(first.samples, again.samples)
        assert first.estimate == again.estimate and first.seed == 5
        assert first.estimate != other.estimate
        drawn = [trace(a, method=method, seed=None) for _ in range(2)]
        assert drawn[0].seed != drawn[1].seed and drawn[0].estimate != drawn[1].estimate
        repeated = trace(a, method=method, seed=drawn[0].seed)
        assert repeated.estimate == drawn[0].estimate

    @methods
    def test_the_budget_is_used(self, method):
        """Of a number that neither two nor three nor the block divides."""
        result = trace(decaying(), method=method, num_matvecs=PRODUCTS + 1)
        expected = PRODUCTS + (method != "xtrace")
        assert result.num_matvecs == expected == result.history[-1].matvecs

    @methods
    def test_progress(self, method):
        seen = []
        result = trace(decaying(), method=method, callback=seen.append)
        assert isinstance(result, TraceResult) and isinstance(seen[0], TraceProgress)
        assert tuple(seen) == result.history
        counts = [entry.matvecs for entry in seen]
        assert counts == sorted(counts) and counts[-1] == PRODUCTS
        assert seen[-1].estimate == result.estimate and seen[-1].stderr == result.stderr
        assert all(entry.max_matvecs == PRODUCTS and entry.until is None for entry in seen)
        assert set(result.seconds) == {"compile", "products", "host", "total"}

    def test_operators_of_every_kind(self):
        a = decaying().astype(np.float32)
        expected = trace(a).estimate
        for other in (aslinearoperator(a), a.tolist(), cx.from_matvec(lambda v: a @ v, N)):
            assert abs(trace(other).estimate - expected) < 1e-4

    def test_auto_is_xtrace_while_its_sketch_fits(self, monkeypatch):
        a = decaying()
        assert trace(a).method == "xtrace"
        monkeypatch.setattr("curvax.memory.memory_of", lambda op: Memory(4 * op.shape[0] * 24))
        assert trace(a).method == "hutchinson"
        monkeypatch.setattr("curvax.memory.memory_of", lambda op: Memory(4 * op.shape[0] * 12))
        with pytest.raises(MemoryError, match="keeps 12 vectors, .* lower num_matvecs, or use"):
            trace(a, method="xtrace")


class TestUntil:
    @methods
    def test_stops_when_reached(self, method):
        result = trace(decaying(), method=method, until=0.2)
        assert result.stderr <= 0.2 and len(result.samples) >= 10
        assert 10 <= result.num_matvecs < 10 * PRODUCTS
        assert abs(result.estimate - np.trace(decaying())) < 5 * 0.2
        assert all(entry.until == 0.2 for entry in result.history)

    @pytest.mark.parametrize("method", SKETCHES)
    def test_sketches_grow(self, method):
        """Beyond what `num_matvecs` made room for, to an error that samples do not reach."""
        result = trace(decaying(), method=method, until=0.05)
        assert result.stderr <= 0.05 and PRODUCTS < result.num_matvecs < 10 * PRODUCTS
        sketch = len(result.samples)
        if method == "hutch++":
            sketch = (result.num_matvecs - len(result.samples)) // 2
        # At the first look at the standard error the sketch of hutch++ is at 12.
        assert sketch > (PRODUCTS if method == "xnystrace" else 12)
        # √(2 ‖A‖_F² / s), with ‖A‖_F² = π²/6.
        assert np.sqrt(2 * 1.64 / (10 * PRODUCTS)) > 2 * 0.05

    @methods
    def test_warns_when_not_reached(self, method):
        with pytest.warns(cx.ConvergenceWarning, match="after 24 products, above until=1e-05"):
            result = trace(decaying(), method=method, until=1e-5, max_matvecs=PRODUCTS)
        assert result.num_matvecs == PRODUCTS and result.stderr > 1e-5

    def test_the_default_limit(self):
        with pytest.warns(cx.ConvergenceWarning, match="raise max_matvecs"):
            result = trace(decaying(), method="hutchinson", num_matvecs=4, until=1e-5)
        assert result.num_matvecs == 40

    def test_a_sketch_that_memory_keeps_small(self, monkeypatch):
        monkeypatch.setattr("curvax.estimators.trace_methods.available_bytes", lambda op: 0)
        with pytest.warns(cx.ConvergenceWarning, match="after 24 products"):
            result = trace(decaying(), method="xtrace", until=1e-6)
        assert len(result.samples) == PRODUCTS // 2


def test_programs_allocate_no_vectors():
    """Beside their results: what they need for pieces of the vectors does not grow with n."""
    n, rows = 1 << 21, 3
    block = jax.ShapeDtypeStruct((1, n), jnp.float32)
    basis = jax.ShapeDtypeStruct((rows, n), jnp.float32)
    small = 64 * rows << 16
    clock = Clock()
    assert probing.forms.work_bytes(clock, block, block) < small
    assert probing.inner.work_bytes(clock, basis, block) < small
    assert probing.project_off.work_bytes(clock, basis, block) < small
    like, seed = jax.ShapeDtypeStruct((rows,), jnp.int32), np.uint32(0)
    assert probing.overlaps["gaussian"].work_bytes(clock, basis, like, seed) < small
