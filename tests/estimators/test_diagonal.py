"""`diagonal`: the article's examples, brute force on the same probes, exact cases, bad input."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tests.estimators import references
from tests.estimators.references import BLOCK, PRODUCTS
from tests.krylov.spectra import N, matrix

import curvax as cx
from curvax.device import probing
from curvax.estimators import exact
from curvax.memory import Memory
from curvax.program import Clock
from curvax.results import BlockResults, DiagonalResult

EPS = float(np.finfo(np.float32).eps)
METHODS = ("hutchinson", "xdiag")


methods = pytest.mark.parametrize("method", METHODS)


def _diagonal(a, **options):
    """In float32 where `a` is a NumPy array."""
    a = a.astype(np.float32) if isinstance(a, np.ndarray) else a
    return cx.diagonal(a, **{"num_matvecs": PRODUCTS, "block_size": BLOCK, "seed": 0, **options})


class TestArticle:
    """The examples of an article on Hessian diagonals, with the parameters as literals."""

    @pytest.mark.parametrize("params", [(1.6226422, 1.6226422), (-3.0, 0.25)])
    def test_line(self, params):
        x = jnp.asarray([1.0, 2.0, 3.0])
        y = jnp.asarray([2.0, 4.0, 6.0])

        def loss(p, batch):
            w, b = p
            return jnp.mean((w * batch[0] + b - batch[1]) ** 2)

        op = cx.hessian(loss, tuple(jnp.float32(p) for p in params), (x, y))
        result = cx.diagonal(op, method="exact")
        assert isinstance(result.estimate, tuple)
        np.testing.assert_allclose(np.array(result.estimate), [28 / 3, 2], rtol=4 * EPS)

    SETTINGS = [
        (
            [1.6226422, 2.0252647, 1.6226422, 2.0252647, -0.43359444, -0.07861735]
            + [1.6226422, 1.6226422, 2.0252647],
            [5.265935, 8.203395, 5.265935, 8.203395, 21.06374, 32.81358, 2, 11.310676, 30.315489],
        ),
        (
            [-0.20584214, -0.78476578, -0.20584214, -0.78476578, 1.81608667, 0.18784401]
            + [-0.20584214, -0.20584214, -0.78476578],
            [0.084741973, 1.231714648, 0.084741973, 1.231714648, 0.338967891, 4.926858591, 2]
            + [20.743099653, 2.850524734],
        ),
        (
            [-0.78476596, 0.85644484, 1.8160863, -0.75488514, 0.33988908, -0.53483534]
            + [-0.20584226, -0.78476596, 0.85644484],
            [1.2317152, 1.4669955, 1.2317152, 1.4669955, 4.926861, 5.867982, 2, 5.8557158]
            + [1.874478],
        ),
    ]

    @pytest.mark.parametrize("flat, expected", SETTINGS)
    def test_two_layers(self, flat, expected):
        like = {
            "linear1": {"weight": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)},
            "linear2": {"weight": np.zeros(2, np.float32), "bias": np.zeros((), np.float32)},
        }
        _, unravel = ravel_pytree(like)
        params = unravel(jnp.asarray(flat, jnp.float32))

        def loss(p, batch):
            hidden = jnp.dot(batch[0][0], p["linear1"]["weight"]) + p["linear1"]["bias"]
            out = jnp.dot(hidden, p["linear2"]["weight"]) + p["linear2"]["bias"]
            return jnp.mean((out - batch[1][0]) ** 2)

        # One sample; a batch has a leading axis.
        batch = jnp.asarray([[1.0, 2.0]]), jnp.asarray([3.0])
        result = cx.diagonal(cx.hessian(loss, params, batch), method="exact")
        assert jax.tree.structure(result.estimate) == jax.tree.structure(like)
        found = np.asarray(ravel_pytree(result.estimate)[0], np.float64)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert not np.any(ravel_pytree(result.stderr)[0])


class TestExact:
    def test_dense(self):
        a = matrix("both signs").astype(np.float32)
        result = cx.diagonal(a, method="exact")
        np.testing.assert_array_equal(np.asarray(result.estimate), np.diag(a))
        np.testing.assert_array_equal(np.asarray(result.stderr), np.zeros(N, np.float32))
        assert isinstance(result, DiagonalResult) and result.seed is None
        assert result.num_matvecs == N == result.num_samples and result.method == "exact"

    @pytest.mark.parametrize("block", [1, 7, 32])
    def test_chunks_that_do_not_divide_n(self, block):
        a = matrix("both signs").astype(np.float32)
        seen = []
        result = cx.diagonal(a, method="exact", block_size=block, callback=seen.append)
        np.testing.assert_array_equal(np.asarray(result.estimate), np.diag(a))
        assert [entry.matvecs for entry in seen] == [*range(block, N, block), N]
        assert abs(seen[-1].estimate - np.trace(a.astype(np.float64))) < 1e-3
        assert seen[-1].stderr == 0 and all(entry.stderr == np.inf for entry in seen[:-1])

    def test_chunk_is_bounded_by_memory(self, monkeypatch):
        op = cx.from_matvec(lambda v: 2 * v, 1000)
        assert exact.chunk_size(op, Clock()) == 64
        monkeypatch.setattr(exact, "available_bytes", lambda op: 200_000)
        few = exact.chunk_size(op, Clock())
        assert 1 < few < 64
        like = jnp.zeros(few, jnp.int32)
        assert probing.unit_entries.work_bytes(Clock(), op, like, np.int32(0)) <= 80_000
        monkeypatch.setattr(exact, "available_bytes", lambda op: 0)
        assert exact.chunk_size(op, Clock()) == 1
        assert exact.chunk_size(cx.from_matvec(lambda v: v, 3), Clock()) == 1

    def test_large_operators_take_few_rows(self):
        assert exact.chunk_size(cx.from_matvec(lambda v: 2 * v, 1 << 21), Clock()) == 2

    def test_interrupt_leaves_nan(self):
        a = matrix("outliers").astype(np.float32)

        def press(progress):
            if progress.matvecs == 20:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.warns(cx.InterruptWarning):
            result = cx.diagonal(a, method="exact", block_size=10, callback=press)
        assert result.interrupted and result.num_matvecs == 20
        for entries in (np.asarray(result.estimate), np.asarray(result.stderr)):
            assert np.isnan(entries[20:]).all() and np.isfinite(entries[:20]).all()
        np.testing.assert_array_equal(np.asarray(result.estimate)[:20], np.diag(a)[:20])


class TestAgainstBruteForce:
    @pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
    def test_hutchinson(self, distribution):
        """A regression through the origin for every entry."""
        a = matrix("both signs")
        with jax.enable_x64(True):
            result = cx.diagonal(
                a, num_matvecs=PRODUCTS, block_size=BLOCK, seed=0, distribution=distribution
            )
            z = references.drawn(N, PRODUCTS, 0, distribution, dtype=np.float64)
        w = z @ a
        fit = np.sum(z * w, axis=0) / np.sum(z * z, axis=0)
        np.testing.assert_allclose(np.asarray(result.estimate), fit, rtol=1e-10, atol=1e-12)
        left = np.sum((w - fit * z) ** 2, axis=0)
        stderr = np.sqrt(left / (PRODUCTS - 1) / np.sum(z * z, axis=0))
        np.testing.assert_allclose(np.asarray(result.stderr), stderr, rtol=1e-8)
        assert result.num_samples == result.num_matvecs == PRODUCTS and result.seed == 0

    def test_xdiag(self):
        a, k = matrix("both signs"), PRODUCTS // 2
        with jax.enable_x64(True):
            result = cx.diagonal(a, method="xdiag", num_matvecs=PRODUCTS, block_size=BLOCK, seed=0)
            omega = references.drawn(N, k, 0, "rademacher", dtype=np.float64)
        estimates = references.xdiag(a, omega)
        np.testing.assert_allclose(
            np.asarray(result.estimate), estimates.mean(axis=0), rtol=1e-9, atol=1e-9
        )
        stderr = references.stderr(
            estimates, lambda j: references.xdiag(a, np.delete(omega, j, axis=0))
        )
        np.testing.assert_allclose(np.asarray(result.stderr), stderr, rtol=1e-7)
        assert result.num_samples == k and result.num_matvecs == PRODUCTS


class TestExactCases:
    def test_low_rank_is_exact_for_xdiag(self):
        a = matrix("low rank")
        result = _diagonal(a, method="xdiag")
        error = np.abs(np.asarray(result.estimate, np.float64) - np.diag(a))
        rows = np.linalg.norm(a, axis=1)
        assert np.all(error < 10 * EPS * rows)
        assert np.all(np.asarray(result.stderr) < 10 * EPS * rows)

    def test_signs_are_exact_on_diagonal_operators(self):
        values = jnp.asarray(np.random.default_rng(0).normal(size=N), jnp.float32)
        result = _diagonal(cx.from_matvec(lambda v: values * v, N))
        np.testing.assert_array_equal(np.asarray(result.estimate), np.asarray(values))
        assert np.all(np.asarray(result.stderr) <= 2 * EPS * np.abs(values))

    @methods
    def test_zero(self, method):
        result = _diagonal(np.zeros((N, N)), method=method)
        assert not np.any(result.estimate) and not np.any(result.stderr)

    @methods
    def test_scales(self, method):
        """Also where the squares of the products overflow, or vanish."""
        unit = _diagonal(matrix("both signs"), method=method)
        for scale in (1e-25, 1e-14, 1e14, 1e25):
            result = _diagonal(scale * matrix("both signs"), method=method)
            for found, expected in (
                (result.estimate, unit.estimate),
                (result.stderr, unit.stderr),
            ):
                found = np.asarray(found, np.float64) / scale
                np.testing.assert_allclose(found, np.asarray(expected), rtol=2e-3, atol=2e-4)

    @methods
    def test_float64(self, method):
        a = matrix("both signs")
        options = {"method": method, "num_matvecs": PRODUCTS, "block_size": BLOCK, "seed": 0}
        with jax.enable_x64(True):
            one, two = (cx.diagonal(x, **options) for x in (a, a + 1e-9 * np.eye(N)))
            assert one.estimate.dtype == np.float64
        difference = np.asarray(two.estimate) - np.asarray(one.estimate)
        tolerance = 1e-12 if method == "hutchinson" else 1e-8
        assert np.all(np.abs(difference - 1e-9) < tolerance)


def test_one_probe_shows_no_spread():
    a = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)

    def press(progress):
        os.kill(os.getpid(), signal.SIGINT)

    options = {"method": "xdiag", "num_matvecs": 20, "block_size": 1, "seed": 0}
    with pytest.warns(cx.InterruptWarning):
        result = cx.diagonal(a + a.T, **options, callback=press)
    assert result.interrupted and np.isinf(result.stderr).all()


class TestExactWhereItIsCheaper:
    A = np.random.default_rng(4).normal(size=(20, 20)).astype(np.float32)

    @pytest.mark.parametrize("method", ["auto", "xdiag"])
    def test_with_n_products(self, method):
        a = self.A + self.A.T
        result = cx.diagonal(a, method=method, num_matvecs=20, seed=0)
        assert result.method == "exact" and result.num_matvecs == 20
        np.testing.assert_array_equal(result.estimate, np.diag(a))

    def test_not_with_fewer_or_by_name(self):
        a = self.A + self.A.T
        assert cx.diagonal(a, num_matvecs=19, seed=0).method == "hutchinson"
        assert cx.diagonal(a, method="hutchinson", num_matvecs=20, seed=0).method == "hutchinson"


class TestStatistics:
    @methods
    def test_block_size_changes_nothing_but_roundings(self, method):
        one, several = (_diagonal(matrix("outliers"), method=method, block_size=b) for b in (7, 4))
        np.testing.assert_allclose(one.estimate, several.estimate, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.stderr, several.stderr, rtol=1e-3, atol=1e-4)
        assert one.num_matvecs == several.num_matvecs and one.block_size == 7

    @methods
    def test_seeds(self, method):
        first, again, other = (
            _diagonal(matrix("outliers"), method=method, seed=seed) for seed in (5, 5, 6)
        )
        np.testing.assert_array_equal(first.estimate, again.estimate)
        np.testing.assert_array_equal(first.stderr, again.stderr)
        assert first.seed == 5 and not np.array_equal(first.estimate, other.estimate)
        drawn = [_diagonal(matrix("outliers"), method=method, seed=None) for _ in range(2)]
        assert drawn[0].seed != drawn[1].seed

    @methods
    def test_progress_estimates_the_trace(self, method):
        seen = []
        _diagonal(matrix("outliers"), method=method, callback=seen.append)
        assert len(seen) == (PRODUCTS if method == "hutchinson" else PRODUCTS // 2) / BLOCK
        assert seen[-1].matvecs == PRODUCTS
        assert abs(seen[-1].estimate - np.trace(matrix("outliers"))) < 5 * seen[-1].stderr

    @methods
    def test_interrupt_keeps_the_probes_so_far(self, method):
        def press(progress):
            if progress.matvecs == PRODUCTS:
                os.kill(os.getpid(), signal.SIGINT)

        options = {"method": method, "num_matvecs": 2 * PRODUCTS}
        with pytest.warns(cx.InterruptWarning):
            result = _diagonal(matrix("outliers"), callback=press, **options)
        same = _diagonal(matrix("outliers"), method=method)
        assert result.interrupted and result.num_matvecs == PRODUCTS and not same.interrupted
        assert result.num_samples == same.num_samples
        assert result.num_samples == PRODUCTS // (1 if method == "hutchinson" else 2)
        np.testing.assert_allclose(result.estimate, same.estimate, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.stderr, same.stderr, rtol=1e-4, atol=1e-5)


class TestPytrees:
    LIKE = {"layers": [{"w": np.zeros((8, 9), np.float32), "b": np.zeros(8, np.float32)}] * 2}

    def _operator(self):
        _, unravel = ravel_pytree(self.LIKE)
        a = matrix("both signs").astype(np.float32)
        m = jnp.asarray(a)

        def product(v):
            return unravel(jnp.dot(m, ravel_pytree(v)[0], precision="highest"))

        return cx.from_matvec(product, self.LIKE), a

    @pytest.mark.parametrize("method", ["exact", *METHODS])
    def test_structure(self, method):
        op, a = self._operator()
        result = _diagonal(op, method=method)
        flat = _diagonal(a, method=method)
        for tree, vector in ((result.estimate, flat.estimate), (result.stderr, flat.stderr)):
            assert jax.tree.structure(tree) == jax.tree.structure(self.LIKE)
            shapes = jax.tree.map(np.shape, tree)
            assert shapes == jax.tree.map(np.shape, self.LIKE)
            np.testing.assert_allclose(ravel_pytree(tree)[0], vector, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("method", ["exact", *METHODS])
    def test_one_run_serves_all_blocks(self, method):
        op, _ = self._operator()
        results = _diagonal(op.blocks(2), method=method)
        whole = _diagonal(op, method=method)
        assert isinstance(results, BlockResults) and tuple(results) == ("layers.0", "layers.1")
        for i, result in enumerate(results.values()):
            assert result.num_matvecs == whole.num_matvecs
            for name in ("b", "w"):
                for kind in ("estimate", "stderr"):
                    np.testing.assert_array_equal(
                        getattr(result, kind)[name], getattr(whole, kind)["layers"][i][name]
                    )


class TestBadInput:
    @pytest.mark.parametrize(
        "options, error, message",
        [
            (
                {"method": "xtrace"},
                ValueError,
                r"method must be one of \('auto', 'hutchinson', 'xdiag', 'e",
            ),
            ({"method": None}, TypeError, "method must be one of"),
            ({"num_matvecs": 0}, ValueError, "num_matvecs must be at least 1, got 0"),
            ({"num_matvecs": 1}, ValueError, "at least 2, got 1, with method='h"),
            (
                {"num_matvecs": 19, "method": "xdiag"},
                ValueError,
                "at least 20, got 19, with method='xd",
            ),
            ({"num_matvecs": "many"}, TypeError, "num_matvecs must be an integer"),
            ({"distribution": "auto"}, ValueError, r"distribution must be one of \('rademacher'"),
            (
                {"distribution": "gaussian", "method": "xdiag"},
                ValueError,
                "distribution must be 'rademacher', got 'gaussian'",
            ),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"block_size": 33}, ValueError, "block_size must be at most 32, got 33"),
            ({"callback": 3}, TypeError, "callback must be callable"),
        ],
    )
    def test_arguments(self, options, error, message):
        with pytest.raises(error, match=message):
            cx.diagonal(matrix("outliers").astype(np.float32), **options)

    def test_memory(self, monkeypatch):
        monkeypatch.setattr("curvax.memory.memory_of", lambda op: Memory(4 * op.shape[0] * 24))
        with pytest.raises(MemoryError, match="method='xdiag' with num_matvecs=24 needs .* lower"):
            _diagonal(matrix("outliers"), method="xdiag")

    @pytest.mark.parametrize("method", ["exact", *METHODS])
    def test_nonfinite_products_name_the_leaf(self, method):
        def product(v):
            return {"w": v["w"] / 0.0, "x": v["x"]}

        like = {"w": np.zeros(3, np.float32), "x": np.zeros(N - 3, np.float32)}
        with pytest.raises(FloatingPointError, match=r"product \d+ .* not finite.* in: w \(\d+ of"):
            _diagonal(cx.from_matvec(product, like), method=method)

    def test_asymmetry_is_measured_by_xdiag(self):
        a = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
        with pytest.raises(ValueError, match="A must be symmetric"):
            _diagonal(cx.from_matvec(lambda v: jnp.dot(a, v), N), method="xdiag")

    @pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
    def test_inside_a_transformation(self, transform):
        with pytest.raises(TypeError, match="diagonal runs on the host: call it outside jax.jit"):
            transform(lambda a: cx.diagonal(a).estimate)(jnp.ones((3, 3, 3)))


def test_programs_allocate_no_vectors():
    """Beside their results: the state of Hutchinson's method is updated in place."""
    n = 1 << 21
    state, block = (jax.ShapeDtypeStruct((rows, n), jnp.float32) for rows in (3, 1))
    assert probing.regress.work_bytes(Clock(), state, block, block) < 64 << 16
    one = np.float64(1)
    need = probing.regression_stderr.work_bytes(Clock(), state, one, one)
    assert need < 4 * n + (64 << 16)
