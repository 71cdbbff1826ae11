"""`trace`: against brute force on the same probes, exact cases, standard errors, bad input."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import aslinearoperator
from tests.estimators import references
from tests.krylov.spectra import SPECTRA, N, matrix

import curvax as cx
from curvax.compiled import Clock
from curvax.estimators import programs
from curvax.estimators import trace as trace_module
from curvax.estimators.arguments import ROUNDINGS
from curvax.results import BlockResults, TraceProgress, TraceResult

EPS = float(np.finfo(np.float32).eps)
METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
SKETCHES = METHODS[1:]

methods = pytest.mark.parametrize("method", METHODS)


def _decaying():
    """Positive definite, eigenvalues 1/i."""
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
    return (q / np.arange(1, N + 1)) @ q.T


# Most tests share these numbers, and so the compiled programs.
PRODUCTS, BLOCK = 24, 4


def _trace(a, **options):
    """In float32 where `a` is a NumPy array."""
    a = a.astype(np.float32) if isinstance(a, np.ndarray) else a
    return cx.trace(a, **{"num_matvecs": PRODUCTS, "block_size": BLOCK, "seed": 0, **options})


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
        a = _decaying()
        result, z, _ = self._run(a, "hutchinson", distribution, PRODUCTS)
        samples = np.sum(z * (z @ a), axis=1)
        np.testing.assert_allclose(result.samples, samples, rtol=1e-12)
        assert abs(result.estimate - samples.mean()) < 1e-12
        assert abs(result.stderr - samples.std(ddof=1) / np.sqrt(PRODUCTS)) < 1e-12
        half = 2.0686576 * result.stderr  # Student's t, 23 degrees of freedom
        np.testing.assert_allclose(
            result.interval, [result.estimate - half, result.estimate + half], rtol=1e-6
        )

    @pytest.mark.parametrize("distribution", ["rademacher", "sphere"])
    def test_hutch_plus_plus(self, distribution):
        a, k = matrix("both signs"), PRODUCTS // 3
        result, omega, z = self._run(a, "hutch++", distribution, k, k)
        estimate, samples = references.hutch_plus_plus(a, omega, z, distribution == "sphere")
        np.testing.assert_allclose(result.samples, samples, rtol=1e-9, atol=1e-9)
        assert abs(result.estimate - estimate) < 1e-9
        assert abs(result.stderr - samples.std(ddof=1) / np.sqrt(k)) < 1e-9

    @pytest.mark.parametrize("distribution", ["rademacher", "sphere"])
    @pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
    def test_leave_one_out(self, method, distribution):
        a = matrix("both signs") if method == "xtrace" else _decaying()
        k = PRODUCTS // 2 if method == "xtrace" else PRODUCTS
        result, omega, _ = self._run(a, method, distribution, k)
        brute, scaled = getattr(references, method), distribution == "sphere"
        estimates = brute(a, omega, scaled)
        np.testing.assert_allclose(result.samples, estimates, rtol=1e-9, atol=1e-9)
        assert abs(result.estimate - estimates.mean()) < 1e-9
        stderr = references.stderr(
            estimates, lambda j: brute(a, np.delete(omega, j, axis=0), scaled)
        )
        assert abs(result.stderr - stderr) < 1e-8


class TestExactCases:
    @pytest.mark.parametrize("method", SKETCHES)
    def test_low_rank(self, method):
        a = matrix("low rank")
        if method == "xnystrace":
            a = a @ a
        result = _trace(a, method=method)
        scale = np.linalg.norm(a)
        # The Nyström form is shifted by what the roundings of the products may take from it.
        allowed = (100 if method == "xnystrace" else 8) * EPS * scale
        assert abs(result.estimate - np.trace(a)) < allowed
        low, high = result.interval
        assert low <= np.trace(a) <= high and high - low < 10 * allowed

    @methods
    def test_zero(self, method):
        result = _trace(np.zeros((N, N)), method=method)
        assert result.estimate == 0 and result.stderr == 0 and result.interval == (0, 0)

    def test_signs_are_exact_on_diagonal_operators(self):
        values = jnp.asarray(SPECTRA["outliers"], jnp.float32)
        result = _trace(cx.from_matvec(lambda v: values * v, N), method="hutchinson")
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
        sampled = _trace(matrix("outliers"), method="hutchinson", num_matvecs=N)
        assert sampled.method == "hutchinson" and sampled.stderr > 0

    @methods
    def test_scales(self, method):
        unit = _trace(_decaying(), method=method)
        for scale in (1e-14, 1e14):
            result = _trace(scale * _decaying(), method=method)
            assert abs(result.estimate / scale - unit.estimate) < 1e-4
            assert abs(result.stderr / scale - unit.stderr) < 1e-3 * unit.stderr

    @methods
    def test_float64(self, method):
        """A change of 1e-9 of the operator is seen."""
        options = {"method": method, "num_matvecs": PRODUCTS, "block_size": BLOCK, "seed": 0}
        with jax.enable_x64(True):
            a = _decaying()
            results = [cx.trace(x, **options) for x in (a + 1e-9 * np.eye(N), a)]
        difference = results[0].estimate - results[1].estimate
        assert abs(difference - N * 1e-9) < 0.2 * N * 1e-9
        with pytest.raises(ValueError, match="64-bit mode is off"):
            cx.trace(_decaying())


class TestStatistics:
    @pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
    def test_block_size_changes_nothing_but_roundings(self, method):
        one, several = (_trace(_decaying(), method=method, block_size=b) for b in (7, BLOCK))
        np.testing.assert_allclose(one.samples, several.samples, rtol=1e-3, atol=1e-4)
        assert abs(one.estimate - several.estimate) < 1e-4 * one.estimate
        assert abs(one.stderr - several.stderr) < 1e-3 * one.stderr
        assert one.num_matvecs == several.num_matvecs == PRODUCTS and one.block_size == 7

    @methods
    def test_seeds(self, method):
        a = _decaying()
        first, again, other = (_trace(a, method=method, seed=seed) for seed in (5, 5, 6))
        np.testing.assert_array_equal(first.samples, again.samples)
        assert first.estimate == again.estimate and first.seed == 5
        assert first.estimate != other.estimate
        drawn = [_trace(a, method=method, seed=None) for _ in range(2)]
        assert drawn[0].seed != drawn[1].seed and drawn[0].estimate != drawn[1].estimate
        repeated = _trace(a, method=method, seed=drawn[0].seed)
        assert repeated.estimate == drawn[0].estimate

    @methods
    def test_the_budget_is_used(self, method):
        """Of a number that neither two nor three nor the block divides."""
        result = _trace(_decaying(), method=method, num_matvecs=PRODUCTS + 1)
        expected = PRODUCTS + (method != "xtrace")
        assert result.num_matvecs == expected == result.history[-1].matvecs

    @methods
    def test_progress(self, method):
        seen = []
        result = _trace(_decaying(), method=method, callback=seen.append)
        assert isinstance(result, TraceResult) and isinstance(seen[0], TraceProgress)
        assert tuple(seen) == result.history
        counts = [entry.matvecs for entry in seen]
        assert counts == sorted(counts) and counts[-1] == PRODUCTS
        assert seen[-1].estimate == result.estimate and seen[-1].stderr == result.stderr
        assert all(entry.max_matvecs == PRODUCTS and entry.until is None for entry in seen)
        assert set(result.seconds) == {"compile", "products", "host", "total"}

    def test_operators_of_every_kind(self):
        a = _decaying().astype(np.float32)
        expected = _trace(a).estimate
        for other in (aslinearoperator(a), a.tolist(), cx.from_matvec(lambda v: a @ v, N)):
            assert abs(_trace(other).estimate - expected) < 1e-4

    def test_auto_is_xtrace_while_its_sketch_fits(self, monkeypatch):
        a = _decaying()
        assert _trace(a).method == "xtrace"
        monkeypatch.setattr(trace_module, "available_bytes", lambda: 4 * N * 24)
        assert _trace(a).method == "hutchinson"
        monkeypatch.setattr(trace_module, "available_bytes", lambda: 4 * N * 12)
        with pytest.raises(MemoryError, match="keeps 12 vectors, .* lower num_matvecs, or use"):
            _trace(a, method="xtrace")


class TestUntil:
    @methods
    def test_stops_when_reached(self, method):
        result = _trace(_decaying(), method=method, until=0.2)
        assert result.stderr <= 0.2 and len(result.samples) >= 10
        assert 10 <= result.num_matvecs < 10 * PRODUCTS
        assert abs(result.estimate - np.trace(_decaying())) < 5 * 0.2
        assert all(entry.until == 0.2 for entry in result.history)

    @pytest.mark.parametrize("method", SKETCHES)
    def test_sketches_grow(self, method):
        """Beyond what `num_matvecs` made room for, to an error that samples do not reach."""
        result = _trace(_decaying(), method=method, until=0.05)
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
            result = _trace(_decaying(), method=method, until=1e-5, max_matvecs=PRODUCTS)
        assert result.num_matvecs == PRODUCTS and result.stderr > 1e-5

    def test_the_default_limit(self):
        with pytest.warns(cx.ConvergenceWarning, match="raise max_matvecs"):
            result = _trace(_decaying(), method="hutchinson", num_matvecs=4, until=1e-5)
        assert result.num_matvecs == 40

    def test_a_sketch_that_memory_keeps_small(self, monkeypatch):
        monkeypatch.setattr("curvax.estimators.trace_methods.available_bytes", lambda: 0)
        with pytest.warns(cx.ConvergenceWarning, match="after 24 products"):
            result = _trace(_decaying(), method="xtrace", until=1e-6)
        assert len(result.samples) == PRODUCTS // 2


@functools.lru_cache
def _outliers():
    """An operator of three outliers over a bulk, its trace, and its three pairs."""
    bulk = np.random.default_rng(0).uniform(size=N - 3)
    values = jnp.asarray(np.concatenate([[1000, 500, 200], bulk]), jnp.float32)
    op = cx.from_matvec(lambda v: values * v, N)
    return op, float(np.sum(np.asarray(values, np.float64))), cx.eigsh(op, 3, seed=0, max_basis=40)


class TestDeflation:
    def test_error_falls_as_the_norm_that_is_left(self):
        op, _, pairs = _outliers()
        options = {"method": "hutchinson", "distribution": "gaussian"}
        plain, deflated = (_trace(op, **options, deflate=x) for x in (None, pairs))
        assert deflated.num_matvecs == plain.num_matvecs == PRODUCTS
        assert plain.num_deflated == 0 and deflated.num_deflated == 3
        # √(2 ‖A‖_F² / 24): 328 before and 2.1 after.
        assert 10 * deflated.stderr < plain.stderr
        assert 1 < deflated.stderr < 4

    @methods
    def test_interval_holds(self, method):
        op, truth, pairs = _outliers()
        result = _trace(op, method=method, deflate=pairs)
        # Signs are exact on what is left of a diagonal operator.
        assert abs(result.estimate - truth) < 4 * result.stderr + 8 * EPS * truth
        assert result.stderr < 5 and result.num_deflated == 3

    @methods
    def test_unbiased_though_the_vectors_are_not_eigenvectors(self, method):
        """Mean over many probes, with vectors at angles of 0.1 to eigenvectors."""
        op, truth, pairs = _outliers()
        x = np.asarray(pairs.eigenvectors, np.float64)
        noise = np.random.default_rng(1).normal(size=x.shape)
        x = np.linalg.qr((x + 0.1 / np.sqrt(N) * noise).T)[0].T.astype(np.float32)
        products = np.asarray(op @ jnp.asarray(x), np.float64)
        quotients = np.sum(products * x, axis=1)
        assert np.linalg.norm(products - quotients[:, None] * x) > 50
        rough = dataclasses.replace(pairs, eigenvectors=jnp.asarray(x), eigenvalues=quotients)
        results = [_trace(op, method=method, seed=seed, deflate=rough) for seed in range(60)]
        errors = np.array([result.estimate for result in results]) - truth
        assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(60)

    def test_bad_results(self):
        op, _, pairs = _outliers()
        with pytest.raises(TypeError, match="deflate must be an EigenResult, .* got list"):
            _trace(op, deflate=[1, 2])
        bare = dataclasses.replace(pairs, eigenvectors=None)
        with pytest.raises(ValueError, match="deflate has no eigenvectors"):
            _trace(op, deflate=bare)
        with pytest.raises(ValueError, match="deflate.eigenvectors must have shape"):
            _trace(cx.identity(1000), deflate=pairs)
        small = np.diag([3.0, 2, 1]).astype(np.float32)
        with pytest.raises(ValueError, match="deflate must hold fewer pairs than n = 3, got 3"):
            cx.trace(small, num_matvecs=2, method="hutchinson", deflate=cx.eigsh(small, 3))


class _Press:
    """Presses Ctrl-C once, when so many products are made."""

    def __init__(self, matvecs):
        self.matvecs = matvecs

    def __call__(self, progress):
        if progress.matvecs >= self.matvecs:
            self.matvecs = np.inf
            os.kill(os.getpid(), signal.SIGINT)


class TestInterrupt:
    @methods
    def test_keeps_the_samples_so_far(self, method):
        a = _decaying()
        result = _trace(a, method=method, callback=_Press(8))
        assert result.interrupted and result.num_matvecs == 8
        # Hutch++ has no samples yet of what its sketch leaves.
        assert result.method == ("xtrace" if method == "hutch++" else method)
        assert abs(result.estimate - np.trace(a)) < 5 * result.stderr
        assert np.isfinite(result.stderr) and result.history[-1].matvecs == 8

    def test_of_a_single_sample(self):
        result = _trace(_decaying(), method="xtrace", callback=_Press(1), block_size=1)
        assert result.interrupted and np.isfinite(result.estimate)
        assert result.stderr == np.inf and result.interval == (-np.inf, np.inf)

    def test_of_an_exact_trace(self):
        a = _decaying().astype(np.float32)
        result = cx.trace(a, num_matvecs=N, callback=_Press(1))
        assert result.interrupted and result.num_matvecs == 64 and np.isnan(result.estimate)
        assert result.interval == (-np.inf, np.inf)


class TestBlocks:
    LIKE = {"layers": [{"w": np.zeros((8, 9), np.float32), "b": np.zeros(8, np.float32)}] * 2}
    NAMES = ("layers.0", "layers.1")

    def _blocks(self):
        """Two blocks of 80 parameters, their operator, and the traces."""
        rng = np.random.default_rng(0)
        a = rng.normal(size=(N, N))
        a = (a @ a.T / N).astype(np.float32)
        _, unravel = ravel_pytree(self.LIKE)
        m = jnp.asarray(a)

        def product(v):
            return unravel(jnp.dot(m, ravel_pytree(v)[0], precision="highest"))

        op = cx.from_matvec(product, self.LIKE)
        diagonal = np.diag(a.astype(np.float64))
        truth = dict(zip(self.NAMES, [diagonal[:80].sum(), diagonal[80:].sum()], strict=True))
        return op.blocks(2), op, truth

    def test_every_probe_serves_all_blocks(self):
        blocks, op, truth = self._blocks()
        seen = []
        results = _trace(blocks, callback=seen.append)
        whole = _trace(op, method="hutchinson")
        assert isinstance(results, BlockResults) and tuple(results) == self.NAMES
        assert len(seen) == PRODUCTS / BLOCK
        for name, result in results.items():
            assert result.method == "hutchinson" and result.num_matvecs == PRODUCTS
            assert abs(result.estimate - truth[name]) < 4 * result.stderr
            spread = np.std(result.samples, ddof=1)
            assert abs(result.stderr - spread / np.sqrt(PRODUCTS)) < 1e-12
        total = sum(result.estimate for result in results.values())
        assert abs(total - whole.estimate) < 1e-9 and abs(seen[-1].estimate - total) < 1e-9
        assert abs(seen[-1].stderr - whole.stderr) < 1e-9

    @pytest.mark.parametrize("method", SKETCHES)
    def test_other_methods_run_block_by_block(self, method):
        blocks, _, truth = self._blocks()
        results = _trace(blocks, method=method)
        for name, result in results.items():
            assert abs(result.estimate - truth[name]) < 5 * result.stderr
            assert result.method == method and result.num_matvecs == PRODUCTS
            again = _trace(blocks[name], method=method, seed=result.seed)
            assert again.estimate == result.estimate
        first, second = results.values()
        assert first.seed != second.seed
        assert second.seconds["compile"] == 0  # equal blocks share their programs

    def test_few_parameters_are_exact(self):
        blocks, _, truth = self._blocks()
        results = cx.trace(blocks, num_matvecs=N)
        for name, result in results.items():
            assert result.method == "exact" and abs(result.estimate - truth[name]) < 1e-4

    def test_until_holds_for_every_block(self):
        blocks, _, _ = self._blocks()
        results = _trace(blocks, method="hutchinson", until=2.0)
        assert max(result.stderr for result in results.values()) <= 2
        with pytest.warns(cx.ConvergenceWarning, match="after 20 products"):
            _trace(blocks, method="hutchinson", until=1e-3, max_matvecs=20)

    def test_interrupt_leaves_out_what_was_not_begun(self):
        blocks, _, _ = self._blocks()
        shared = _trace(blocks, callback=_Press(8))
        assert len(shared) == 2 and all(result.interrupted for result in shared.values())
        apart = _trace(blocks, method="xtrace", callback=_Press(8))
        assert list(apart) == ["layers.0"] and apart["layers.0"].interrupted

    def test_deflation_is_refused(self):
        blocks, op, _ = self._blocks()
        with pytest.raises(ValueError, match="deflate belongs to one operator"):
            _trace(blocks, deflate=cx.eigsh(op, 1))


class TestBadInput:
    @pytest.mark.parametrize(
        "options, error, message",
        [
            ({"method": "hutch"}, ValueError, r"method must be one of \('auto', 'hutchinson', 'hu"),
            ({"method": 3}, TypeError, r"method must be one of .*, got 3"),
            ({"num_matvecs": 0}, ValueError, "num_matvecs must be at least 1, got 0"),
            ({"num_matvecs": 2.5}, TypeError, "num_matvecs must be an integer, got 2.5"),
            ({"num_matvecs": None}, TypeError, "num_matvecs must be an integer, got None"),
            (
                {"num_matvecs": 5, "method": "hutch++"},
                ValueError,
                "num_matvecs must be at least 6 with method='hutch\\+\\+', got 5",
            ),
            ({"num_matvecs": 1, "method": "hutchinson"}, ValueError, "must be at least 2 with"),
            ({"distribution": "normal"}, ValueError, r"distribution must be one of \('auto', 'rad"),
            ({"distribution": None}, TypeError, "distribution must be one of"),
            ({"until": 0}, ValueError, "until, a standard error, must be positive"),
            ({"until": -1.0}, ValueError, "until, a standard error, must be positive"),
            ({"until": np.nan}, ValueError, "until, a standard error, must be positive and finite"),
            ({"until": "small"}, TypeError, "until must be a number"),
            ({"until": 1.0, "max_matvecs": 0}, ValueError, "max_matvecs must be at least 1"),
            ({"until": 1.0, "max_matvecs": 3}, ValueError, "max_matvecs must be at least 4 with"),
            ({"max_matvecs": 30}, ValueError, "max_matvecs is the limit for until="),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"seed": 1.0}, TypeError, "seed must be an integer"),
            ({"block_size": 0}, ValueError, "block_size must be at least 1"),
            ({"block_size": 33}, ValueError, "block_size must be at most 32, got 33"),
            ({"block_size": "tune"}, TypeError, "block_size must be 'auto' or an integer"),
            ({"callback": 3}, TypeError, "callback must be callable"),
        ],
    )
    def test_arguments(self, options, error, message):
        with pytest.raises(error, match=message):
            cx.trace(matrix("outliers").astype(np.float32), **options)

    def test_operators(self):
        with pytest.raises(TypeError, match="A must be a curvax operator"):
            cx.trace("matrix")
        with pytest.raises(ValueError, match="A must be square"):
            cx.trace(np.zeros((2, 3), np.float32))

    @pytest.mark.parametrize("name", ["both signs", "low rank"])
    def test_xnystrace_measures_definiteness(self, name):
        with pytest.raises(
            ValueError, match="positive semidefinite .* eigenvalues from -.* use meth"
        ):
            _trace(matrix(name), method="xnystrace")
        with pytest.raises(ValueError, match="positive semidefinite"):
            _trace(-np.eye(N), method="xnystrace")

    @pytest.mark.parametrize("method", SKETCHES)
    def test_sketches_measure_symmetry(self, method):
        a = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
        op = cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"), N)
        if method == "hutch++":  # which does not need it
            _trace(op, method=method)
            return
        with pytest.raises(ValueError, match="A must be symmetric: .*='hutchinson' does without"):
            _trace(op, method=method)

    @pytest.mark.parametrize("method", ["auto", "exact", *METHODS])
    def test_nonfinite_products_name_the_leaf(self, method):
        def product(v):
            return {"w": v["w"] / 0.0, "x": v["x"], "y": {"z": v["y"]["z"]}}

        like = {"w": np.zeros(3), "x": np.zeros(N - 12), "y": {"z": np.zeros((3, 3))}}
        like = jax.tree.map(lambda x: x.astype(np.float32), like)
        options = {"num_matvecs": N} if method == "exact" else {"method": method}
        with pytest.raises(FloatingPointError, match=r"product \d+ .* not finite.* in: w \(\d+ of"):
            _trace(cx.from_matvec(product, like), **options)

    @pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
    def test_inside_a_transformation(self, transform):
        with pytest.raises(TypeError, match="trace runs on the host: call it outside jax.jit"):
            transform(lambda a: cx.trace(a).estimate)(jnp.ones((3, 3, 3)))


def test_programs_allocate_no_vectors():
    """Beside their results: what they need for pieces of the vectors does not grow with n."""
    n, rows = 1 << 21, 3
    block = jax.ShapeDtypeStruct((1, n), jnp.float32)
    basis = jax.ShapeDtypeStruct((rows, n), jnp.float32)
    small = 64 * rows << 16
    clock = Clock()
    assert programs.forms.work_bytes(clock, block, block) < small
    assert programs.inner.work_bytes(clock, basis, block) < small
    assert programs.project_off.work_bytes(clock, basis, block) < small
    like, seed = jax.ShapeDtypeStruct((rows,), jnp.int32), np.uint32(0)
    assert programs.overlaps["gaussian"].work_bytes(clock, basis, like, seed) < small
