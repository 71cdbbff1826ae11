"""`trace` with a solve's pairs, interrupts, the blocks of an operator; what is refused."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tests.estimators.references import BLOCK, METHODS, PRODUCTS, SKETCHES, decaying, trace
from tests.krylov.spectra import N, matrix

import curvax as cx
from curvax.interrupt import InterruptFlag
from curvax.results import BlockResults

EPS = float(np.finfo(np.float32).eps)

methods = pytest.mark.parametrize("method", METHODS)


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
        plain, deflated = (trace(op, **options, deflate=x) for x in (None, pairs))
        assert deflated.num_matvecs - BLOCK == plain.num_matvecs == PRODUCTS
        assert plain.num_deflated == 0 and deflated.num_deflated == 3
        # √(2 ‖A‖_F² / 24): 328 before and 2.1 after.
        assert 10 * deflated.stderr < plain.stderr
        assert 1 < deflated.stderr < 4

    @methods
    def test_interval_holds(self, method):
        op, truth, pairs = _outliers()
        result = trace(op, method=method, deflate=pairs)
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
        residuals = np.linalg.norm(products - quotients[:, None] * x, axis=1)
        assert np.linalg.norm(residuals) > 50
        rough = dataclasses.replace(
            pairs, eigenvectors=jnp.asarray(x), eigenvalues=quotients, residuals=residuals
        )
        results = [trace(op, method=method, seed=seed, deflate=rough) for seed in range(60)]
        errors = np.array([result.estimate for result in results]) - truth
        assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(60)

    @methods
    @pytest.mark.parametrize("change", ["scaled", "shifted"])
    def test_pairs_of_a_nearby_operator(self, method, change):
        """Which their residuals would allow: their values are measured, not taken as they are."""
        op, truth, pairs = _outliers()
        rough = dataclasses.replace(pairs, residuals=np.full(3, 1.0))
        other, total = 1.001 * op, 1.001 * truth
        if change == "shifted":
            other, total = op + 0.5 * cx.identity(jnp.zeros(N)), truth + 0.5 * N
        results = [trace(other, method=method, deflate=rough, seed=seed) for seed in range(20)]
        held = [result.interval[0] <= total <= result.interval[1] for result in results]
        assert np.sum(held) >= 18
        if method == "hutchinson":  # exact on a diagonal; the values alone are wrong by 1.5 or more
            assert max(np.ptp(result.interval) for result in results) < 0.01

    def test_products_of_a_block(self):
        """Every vector is multiplied once, the last block filled up."""
        op, truth, pairs = _outliers()
        counts = [
            trace(op, method="hutchinson", deflate=pairs, block_size=b).num_matvecs for b in (1, 2)
        ]
        assert counts == [PRODUCTS + 3, PRODUCTS + 4]

    def test_bad_results(self):
        op, _, pairs = _outliers()
        with pytest.raises(TypeError, match="deflate must be an EigenResult, .* got list"):
            trace(op, deflate=[1, 2])
        bare = dataclasses.replace(pairs, eigenvectors=None)
        with pytest.raises(TypeError, match="deflate is a result without eigenvectors"):
            trace(op, deflate=bare)
        with pytest.raises(ValueError, match="deflate must have shape"):
            trace(cx.identity(1000), deflate=pairs)
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
        a = decaying()
        with pytest.warns(cx.InterruptWarning):
            result = trace(a, method=method, callback=_Press(8))
        assert result.interrupted and result.num_matvecs == 8
        # Hutch++ has no samples yet of what its sketch leaves.
        assert result.method == ("xtrace" if method == "hutch++" else method)
        assert abs(result.estimate - np.trace(a)) < 5 * result.stderr
        assert np.isfinite(result.stderr) and result.history[-1].matvecs == 8

    @methods
    def test_before_the_first_block(self, method, monkeypatch):
        """One block is made: there is no result of nothing."""
        monkeypatch.setattr(InterruptFlag, "__bool__", lambda self: True)
        result = trace(decaying(), method=method)
        # Of a sketch a block of probes, and one of its basis.
        products = 2 * BLOCK if method in ("hutch++", "xtrace") else BLOCK
        assert result.interrupted and result.num_matvecs == products
        diagonal = cx.diagonal(decaying().astype(np.float32), block_size=BLOCK, seed=0)
        assert diagonal.num_matvecs == BLOCK and np.isfinite(diagonal.estimate).all()
        assert np.isnan(diagonal.stderr).all()
        assert diagonal.no_stderr == (
            "4 samples are too few to know the error by: 8 are needed, of 8 products"
        )

    def test_of_a_single_sample(self):
        with pytest.warns(cx.InterruptWarning):
            result = trace(decaying(), method="xtrace", callback=_Press(1), block_size=1)
        assert result.interrupted and np.isfinite(result.estimate)
        assert result.stderr == np.inf and result.interval == (-np.inf, np.inf)

    def test_of_an_exact_trace(self):
        a = decaying().astype(np.float32)
        with pytest.warns(cx.InterruptWarning):
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
        results = trace(blocks, callback=seen.append)
        whole = trace(op, method="hutchinson")
        assert isinstance(results, BlockResults) and tuple(results) == self.NAMES
        assert len(seen) == PRODUCTS / BLOCK
        for name, result in results.items():
            assert result.method == "hutchinson" and result.num_matvecs == PRODUCTS
            assert abs(result.estimate - truth[name]) < 4 * result.stderr
        total = sum(result.estimate for result in results.values())
        assert abs(total - whole.estimate) < 1e-9 and abs(seen[-1].estimate - total) < 1e-9
        assert abs(seen[-1].stderr - whole.stderr) < 1e-9

    @pytest.mark.parametrize("method", SKETCHES)
    def test_other_methods_run_block_by_block(self, method):
        blocks, _, truth = self._blocks()
        results = trace(blocks, method=method)
        for name, result in results.items():
            assert abs(result.estimate - truth[name]) < 5 * result.stderr
            assert result.method == method and result.num_matvecs == PRODUCTS
            again = trace(blocks[name], method=method, seed=result.seed)
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
        results = trace(blocks, method="hutchinson", until=2.0)
        assert max(result.stderr for result in results.values()) <= 2
        with pytest.warns(cx.ConvergenceWarning, match="after 20 products"):
            trace(blocks, method="hutchinson", until=1e-3, max_matvecs=20)

    def test_interrupt_leaves_out_what_was_not_begun(self):
        blocks, _, _ = self._blocks()
        with pytest.warns(cx.InterruptWarning):
            shared = trace(blocks, callback=_Press(8))
        assert len(shared) == 2 and all(result.interrupted for result in shared.values())
        with pytest.warns(cx.InterruptWarning):
            apart = trace(blocks, method="xtrace", callback=_Press(8))
        assert list(apart) == ["layers.0"] and apart["layers.0"].interrupted

    def test_deflation_is_refused(self):
        blocks, op, _ = self._blocks()
        with pytest.raises(ValueError, match="deflate belongs to one operator"):
            trace(blocks, deflate=cx.eigsh(op, 1))


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
            ({"until": "small"}, TypeError, "until, a standard error, must be a number"),
            ({"until": 1.0, "max_matvecs": 0}, ValueError, "max_matvecs must be at least 1"),
            ({"until": 1.0, "max_matvecs": 3}, ValueError, "max_matvecs must be at least 4 with"),
            ({"max_matvecs": 30}, ValueError, "max_matvecs is the limit for until="),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"seed": 1.0}, TypeError, "seed must be an integer"),
            ({"block_size": 0}, ValueError, "block_size must be at least 1"),
            ({"block_size": 33}, ValueError, "block_size must be at most 32, got 33"),
            ({"block_size": "tune"}, ValueError, "block_size must be 'auto' or an integer"),
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
            trace(matrix(name), method="xnystrace")
        with pytest.raises(ValueError, match="positive semidefinite"):
            trace(-np.eye(N), method="xnystrace")

    @pytest.mark.parametrize("method", SKETCHES)
    def test_sketches_measure_symmetry(self, method):
        a = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
        op = cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"), N)
        if method == "hutch++":  # which does not need it
            trace(op, method=method)
            return
        with pytest.raises(ValueError, match="A must be symmetric"):
            trace(op, method=method)

    @pytest.mark.parametrize("method", ["auto", "exact", *METHODS])
    def test_nonfinite_products_name_the_leaf(self, method):
        def product(v):
            return {"w": v["w"] / 0.0, "x": v["x"], "y": {"z": v["y"]["z"]}}

        like = {"w": np.zeros(3), "x": np.zeros(N - 12), "y": {"z": np.zeros((3, 3))}}
        like = jax.tree.map(lambda x: x.astype(np.float32), like)
        options = {"num_matvecs": N} if method == "exact" else {"method": method}
        with pytest.raises(FloatingPointError, match=r"product \d+ .* not finite.* in: w \(\d+ of"):
            trace(cx.from_matvec(product, like), **options)

    @pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
    def test_inside_a_transformation(self, transform):
        with pytest.raises(TypeError, match="trace runs on the host: call it outside jax.jit"):
            transform(lambda a: cx.trace(a).estimate)(jnp.ones((3, 3, 3)))
