"""How a solve behaves: certificates, warm starts, seeds, memory, selection."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator
from tests.krylov.spectra import SPECTRA, N, assert_honest, diagonal, matrix, operator, wanted

import curvax as cx
from curvax import _native
from curvax.device import programs, storage
from curvax.krylov import plan as planning
from curvax.krylov.selection import parse_wanted
from curvax.memory import Memory
from curvax.program import Clock

EPS = float(np.finfo(np.float32).eps)


def _two_ends():
    values = jnp.concatenate([jnp.asarray([10.0, 9, -8, -7.9]), jnp.linspace(-1, 1, 56)])
    return cx.from_matvec(lambda v: values * v, 60)


def _noisy(size):
    """A symmetric operator whose products carry an error of relative size `size`."""
    a = jnp.asarray(matrix("outliers"), jnp.float32)
    b = jnp.asarray(np.random.default_rng(1).normal(size=(N, N)), jnp.float32)

    def matvec(v):
        error = jnp.sin(1e4 * (b @ v))
        return a @ v + size * 20 * jnp.linalg.norm(v) * error / jnp.linalg.norm(error)

    return cx.from_matvec(matvec, N)


class TestCertificates:
    @pytest.mark.parametrize("certify, late", [("residuals", 2), ("sampled", 1), ("sampled", 3)])
    def test_a_product_of_the_verification_that_is_not_finite(self, certify, late):
        """Once only: the solve before it was right, and what follows would be."""
        count, values = iter(range(1, 1000)), matrix("two values").astype(np.float32)
        whole = LinearOperator(values.shape, matvec=lambda v: values @ v, dtype=np.float32)
        before = cx.eigsh(whole, 3, certify=certify, seed=0, max_basis=60).num_matvecs

        def matvec(v):
            out = values @ v.reshape(-1)
            if next(count) == before + late:
                out[5] = np.nan
            return out

        op = LinearOperator(values.shape, matvec=matvec, dtype=np.float32)
        number = before + late
        with pytest.raises(FloatingPointError, match=rf"product {number} .*the vector \(1 of"):
            cx.eigsh(op, 3, certify=certify, seed=0, max_basis=60)

    def test_sampled_takes_three_products(self):
        result = cx.eigsh(operator(), 8, certify="sampled", seed=0, max_basis=60)
        assert result.num_verification == 3 and result.all_converged
        scale = np.abs(SPECTRA["outliers"]).max()
        vectors = np.asarray(result.eigenvectors, np.float64)
        true = np.linalg.norm(
            vectors @ matrix("outliers") - result.eigenvalues[:, None] * vectors, axis=1
        )
        # What the recurrence predicts, in pairs that point the same way, is no noise.
        assert result.noise < 1e-5
        # An upper estimate of each, which the recurrence alone is not where products are noisy.
        assert np.all(true <= 1.01 * result.residuals + 20 * EPS * scale)

    def test_sampled_sees_noise_that_the_recurrence_does_not(self):
        result = cx.eigsh(operator(), 5, certify="sampled", seed=0, max_basis=60, tol=1e-6)
        with pytest.warns(cx.ConvergenceWarning):
            noisy = cx.eigsh(_noisy(1e-4), 5, certify="sampled", seed=0, max_basis=60, tol=1e-6)
        assert result.noise < 1e-5 < noisy.noise

    def test_verification_counts_k_products(self):
        result = cx.eigsh(operator(), 7, seed=0, max_basis=60)
        assert result.num_verification == 7
        assert result.history[-1].matvecs == result.num_matvecs
        assert result.history[-1].converged == 7

    def test_products_stay_near_the_smallest_krylov_dimension(self):
        """Against the exact recurrence in float64, from the same kind of start."""
        truth, k = matrix("outliers"), 6
        result = cx.eigsh(operator(), k, which="LA", seed=5, max_basis=80)
        rng = np.random.default_rng(0)
        dimensions = []
        for _ in range(5):
            q = np.linalg.qr(rng.normal(size=(N, 1)))[0]
            while True:
                w = truth @ q[:, -1]
                q = np.column_stack([q, w])
                q, _ = np.linalg.qr(q)
                t = q[:, :-1].T @ truth @ q[:, :-1]
                values, vectors = np.linalg.eigh(t)
                x = q[:, :-1] @ vectors[:, -k:]
                worst = (
                    np.linalg.norm(truth @ x - x * values[-k:], axis=0).max()
                    if (len(values) >= k)
                    else np.inf
                )
                if worst <= 1e-3 * 20:
                    dimensions.append(len(values))
                    break
        assert result.num_matvecs <= 1.1 * max(dimensions)

    def test_tolerance_is_raised_to_the_noise_with_a_warning(self):
        with pytest.warns(cx.ConvergenceWarning, match="noise"):
            result = cx.eigsh(_noisy(1e-4), 4, tol=1e-6, seed=0, max_basis=60)
        assert 1e-5 < result.noise < 1e-3
        assert np.all((result.tol_effective > 1e-5) & (result.tol_effective < 2e-3))
        assert_within = result.residuals <= result.tol_effective * result.history[-1].largest
        np.testing.assert_array_equal(result.converged, assert_within)

    def test_tolerance_zero_asks_for_rounding(self):
        result = cx.eigsh(operator(), 4, tol=0, seed=0, max_basis=60)
        assert result.all_converged and np.all(result.tol_effective < 1e-5)
        assert_honest(matrix("outliers"), result, EPS)

    def test_too_few_products_are_never_silent(self):
        with pytest.warns(cx.ConvergenceWarning, match="of 6 pairs converged after 9 products"):
            result = cx.eigsh(operator(), 6, max_matvecs=9, seed=0, max_basis=60)
        assert not result.all_converged and result.num_matvecs == 9
        assert_honest(matrix("outliers"), result, EPS)

    def test_an_unsettled_runner_up_is_never_silent(self, monkeypatch):
        """With a basis too small to let the runner-up grow, the solve runs out of products."""
        monkeypatch.setattr(planning, "fewest_rows", lambda k, b: k + 2 * b)
        op = _two_ends()
        for seed in range(12):
            for certify in ("residuals", "complete"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", cx.ConvergenceWarning)
                    result = cx.eigsh(op, 2, seed=seed, block_size=1, max_basis=4, certify=certify)
                found = np.allclose(result.eigenvalues, [10, 9], atol=0.05)
                assert found or not result.all_converged
                assert found or not result.complete

    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_the_smallest_basis_finds_both_ends(self, block):
        op = _two_ends()
        for seed in range(8):
            result = cx.eigsh(
                op, 2, seed=seed, block_size=block, max_basis=2 + 4 * block,
                certify="complete",
            )  # fmt: skip
            np.testing.assert_allclose(result.eigenvalues, [10, 9], atol=0.02)
            assert result.complete

    def test_search_out_of_products_is_not_complete(self):
        first = cx.eigsh(operator(), 3, seed=0, max_basis=60)
        result = cx.eigsh(
            operator(), 3, seed=0, max_basis=60, certify="complete",
            max_matvecs=first.num_matvecs + 5,
        )  # fmt: skip
        assert result.complete is False and result.all_converged


class TestStart:
    def test_same_seed_same_bits(self):
        a, b = (cx.eigsh(operator(), 5, seed=11, max_basis=60) for _ in range(2))
        np.testing.assert_array_equal(a.eigenvalues, b.eigenvalues)
        np.testing.assert_array_equal(a.eigenvectors, b.eigenvectors)
        np.testing.assert_array_equal(a.residuals, b.residuals)

    def test_a_drawn_seed_is_recorded(self):
        a = cx.eigsh(operator(), 3, max_basis=60)
        b = cx.eigsh(operator(), 3, max_basis=60, seed=a.seed)
        np.testing.assert_array_equal(a.eigenvectors, b.eigenvectors)
        assert a.seed != cx.eigsh(operator(), 3, max_basis=60).seed

    @pytest.mark.parametrize("block, part", [(1, 0.7), (3, 1.0)])
    def test_warm_start_from_a_result(self, block, part):
        """Of a continuum: to see that nothing has overtaken takes most of a solve from scratch."""
        options = {"max_basis": 60, "block_size": block}
        op, first, again = diagonal(np.linspace(1, 5, 200)), 0, 0
        for seed in range(4):
            cold = cx.eigsh(op, 3, seed=seed, **options)
            warm = cx.eigsh(op, 3, seed=seed, **options, v0=cold)
            first += cold.num_matvecs
            again += warm.num_matvecs
            np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-4)
        assert again < part * first

    @pytest.mark.parametrize("block", [1, 3])
    def test_a_start_in_an_invariant_subspace_is_left(self, block):
        """Every residual is small at once, and larger eigenvalues lie outside."""
        truth = jnp.concatenate([jnp.asarray([10.0, 9, 8, -7, -6]), jnp.linspace(-1, 1, 395)])
        op = cx.from_matvec(lambda v: truth * v, 400)
        low = cx.eigsh(op, 2, which="SA", seed=0, max_basis=60)
        for v0 in (low, np.eye(400)[3:5], np.eye(400)[200]):
            result = cx.eigsh(op, 2, v0=v0, seed=1, max_basis=60, block_size=block)
            np.testing.assert_allclose(result.eigenvalues, [10, 9], rtol=1e-3)

    def test_a_start_cut_short_is_not_converged(self):
        truth = jnp.concatenate([jnp.asarray([10.0, 9, 8, -7, -6]), jnp.linspace(-1, 1, 395)])
        op = cx.from_matvec(lambda v: truth * v, 400)
        with pytest.warns(cx.ConvergenceWarning):
            result = cx.eigsh(op, 1, v0=np.eye(400)[4], seed=1, max_basis=60, max_matvecs=3)
        assert not result.converged.any()

    def test_start_vectors_and_blocks(self):
        rng = np.random.default_rng(0)
        for v0 in (rng.normal(size=N), rng.normal(size=(2, N)), jnp.ones((7, N))):
            result = cx.eigsh(operator(), 3, v0=v0, block_size=2, seed=0, max_basis=60)
            np.testing.assert_allclose(
                result.eigenvalues, wanted(SPECTRA["outliers"], 3, "LM"), rtol=1e-4
            )

    def test_pytree_start(self):
        a = jnp.asarray(matrix("outliers"), jnp.float32)

        def matvec(tree):
            out = a @ jnp.concatenate([tree["x"], tree["y"]])
            return {"x": out[:50], "y": out[50:]}

        like = {"x": np.ones(50, np.float32), "y": np.ones(N - 50, np.float32)}
        op = cx.from_matvec(matvec, like)
        result = cx.eigsh(op, 3, v0=like, seed=0, max_basis=60)
        assert result.eigenvectors["x"].shape == (3, 50)
        again = cx.eigsh(op, 3, v0=result, seed=0, max_basis=60)
        assert again.num_matvecs < result.num_matvecs


class TestMemory:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_the_basis_is_donated_and_never_copied(self, dtype):
        """Read from the programs that a solve compiles, native or not."""
        rows, block, n = 40, 2, 5000
        basis = jax.ShapeDtypeStruct(storage.shape(rows, n, dtype), jnp.dtype(dtype))
        vectors = jax.ShapeDtypeStruct((block, n), np.float32)
        zero, size = np.int32(0), basis.size * basis.dtype.itemsize
        name = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
        shape = f"{name}[{rows},{basis.shape[1]}]"
        calls = [
            (programs.orthonormalize, (basis, vectors, zero, np.zeros(2, np.uint32))),
            (programs.rotate, (basis, np.zeros((rows, rows)), zero, zero)),
        ]
        for program, arguments in calls:
            with jax.enable_x64(True):
                call = jax.jit(program.fun, donate_argnums=program.donate)
                compiled = call.lower(*arguments).compile()
            text = compiled.as_text()
            assert compiled.memory_analysis().alias_size_in_bytes >= size
            assert "input_output_alias" in text
            if _native.use_native("block_ortho"):
                assert not [x for x in text.splitlines() if " copy(" in x and shape in x]
                assert program.work_bytes(Clock("products"), *arguments) < n

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_no_program_widens_the_basis(self, dtype):
        """Beside their results, programs need a few chunks of columns, and no whole vector."""
        rows, k, n = 20, 3, 3_000_001
        basis = jax.ShapeDtypeStruct(storage.shape(rows, n, dtype), jnp.dtype(dtype))
        length, columns = storage.Length(n), basis.shape[1]
        vector, like = jax.ShapeDtypeStruct((1, n), np.float32), np.zeros(1, np.int32)
        op, clock, zero = cx.from_matvec(lambda v: 2 * v, n), Clock("products"), np.int32(0)
        leaves = [jax.ShapeDtypeStruct((size,), np.float32) for size in (n // 3, n - n // 3)]
        two_leaves = cx.from_matvec(lambda v: v, leaves)
        stored = jax.ShapeDtypeStruct((k, columns), basis.dtype)
        for expected, program, *arguments in [
            (4 * n, programs.load, basis, zero, like, length),
            (0, programs.residuals, basis, vector, zero, zero, np.zeros(1), np.zeros((1, 1))),
            (0, programs.gram, basis, np.zeros(k, np.int32), length),
            (4 * n, programs.combine, basis, np.zeros((1, rows), np.float32), length),
            (0, programs.squared_distance, vector, vector),
            (k * columns * basis.dtype.itemsize, programs.take, basis, np.zeros(k, np.int32)),
            (4 * k * n, programs.deliver, two_leaves, stored),
            (4 * n, programs.random_block, op, like, np.uint32(0), np.uint32(0)),
            (0, programs.multiply, op, jax.ShapeDtypeStruct((4, n), np.float32)),
        ]:
            work = program.work_bytes(clock, *arguments)
            assert expected <= work <= expected + 8 * rows * 2**16 < expected + 4 * n, program.fun

    @pytest.mark.parametrize(
        "options, remedy",
        [
            ({"max_basis": 40}, r"lower max_basis \(at least 9\), store the basis in 16 bits"),
            ({}, r"store the basis in 16 bits \(basis_dtype='float16'\), lower k, or lower the"),
            ({"basis_dtype": "float16"}, r"lower k, or lower the number of .* \(where=\)"),
            ({"block_size": 2, "max_basis": N}, "lower max_basis .*, lower block_size, lower k"),
        ],
    )
    def test_what_does_not_fit_is_refused_first(self, monkeypatch, options, remedy):
        monkeypatch.setattr(planning, "memory_of", lambda op: Memory(8_000))
        calls, defaults = [], {"basis_dtype": None}
        message = rf"needs [\d.]+ [kM]B, but 8.00 kB are free: {remedy}"
        with pytest.raises(MemoryError, match=message) as caught:
            cx.eigsh(operator(), 5, callback=calls.append, **options)
        assert str(cx.plan(operator(), 5, **(defaults | options))) in str(caught.value)
        assert not calls

    def test_the_default_basis_shrinks_to_what_is_free(self, monkeypatch):
        free = 100_000
        monkeypatch.setattr(planning, "memory_of", lambda op: Memory(free))
        plan = cx.plan(operator(), 5, basis_dtype=None)
        assert 9 < plan.max_basis < 71 and 0.2 * free < plan.bytes.peak <= 0.4 * free
        result = cx.eigsh(operator(), 5, seed=0)
        assert result.all_converged and result.num_restarts > 0


def test_the_values_alone():
    assert cx.eigsh(operator(), 3, seed=0, return_eigenvectors=False).eigenvectors is None


def test_tuned_block_size():
    result = cx.eigsh(operator(), 3, seed=0, block_size="tune", max_basis=60)
    assert result.block_size in (1, 2, 4, 8) and result.all_converged


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_selection_orders_all_indices(which):
    values = np.asarray([-5.0, 3, 0, -1, 5, 2])
    order = parse_wanted(3, which, 6).order(values)
    assert sorted(order) == list(range(6))
    np.testing.assert_array_equal(np.sort(values[order[:3]])[::-1], wanted(values, 3, which))


def test_who_is_in_doubt():
    values, residuals = np.asarray([10.0, 5, -6, 4, 1]), np.asarray([0, 0, 0, 3.0, 9])

    def doubtful(k, which, allowed=0.1, residuals=residuals):
        wanted_ = parse_wanted(k, which, 5)
        order = wanted_.order(values)
        return wanted_.doubtful(values, residuals, order, np.full(wanted_.k, allowed)).tolist()

    assert doubtful(3, "LM") == [False, True, True]  # 10, -6, 5 before 1 + 9
    assert doubtful(3, "LM", allowed=1) == [False, True, True]
    assert doubtful(3, "LM", allowed=3) == [False, False, False]
    assert doubtful(2, "LA") == [False, True]
    # The next in line is settled, the last is not.
    late = np.asarray([0, 0, 0, 0, 4.5])
    assert doubtful(2, "LA", residuals=late) == [False, True]
    assert doubtful((2, 1), "BE") == [False, True, True]  # from above 1 + 9, from below 1 - 9
    assert doubtful((1, 2), "BE") == [False, False, False]
    assert doubtful(5, "LM") == [False] * 5


def test_where_an_eigenvalue_could_hide():
    def wanted_and(k, which, values, margin=0.1):
        wanted_, values = parse_wanted(k, which, 9), np.asarray(values, float)
        margins = np.full(wanted_.k, margin)
        return np.sort(wanted_.edges(values, margins)), np.sort(
            wanted_.hiding_places(values, margins)
        )

    for which, k, values, edges, places in [
        ("LA", 2, [5, 3], [3.1], [3.1, 4.9, 5.1]),
        ("SA", 2, [-5, -3], [-3.1], [-5.1, -4.9, -3.1]),
        ("LM", 2, [5, -3], [-3.1, 3.1], [-3.1, 3.1, 4.9, 5.1]),
        ("BE", (1, 1), [5, -3], [-3.1, 5.1], [-3.1, 5.1]),
        ("LA", 2, [5, 4.94], [5.04], [5.1]),  # nothing is told from two so close
    ]:
        got = wanted_and(k, which, values)
        np.testing.assert_allclose(got[0], edges)
        np.testing.assert_allclose(np.unique(got[1].round(9)), places)


def test_results_survive_saving(tmp_path):
    import json

    result = cx.eigsh(operator(), 3, seed=0, max_basis=60)
    npz, text = result.save(tmp_path / "deep" / "run")
    arrays, facts = np.load(npz), json.loads(text.read_text())
    np.testing.assert_array_equal(arrays["eigenvalues"], result.eigenvalues)
    np.testing.assert_array_equal(arrays["eigenvectors"], result.eigenvectors)
    assert facts["eigenvalues"] == result.eigenvalues.tolist()
    assert (facts["num_matvecs"], facts["num_verification"]) == (result.num_matvecs, 3)
    assert len(facts["history"]) == len(result.history)
    assert str(result).count("yes") == 3
    assert result.save(tmp_path / "v1.2.npz")[1] == tmp_path / "v1.2.json"
