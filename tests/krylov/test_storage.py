"""A basis stored in 16 bits: what it costs, what it does not, and what is said about it."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.fft import dct, idct
from tests.krylov.spectra import true_residuals, wanted

import curvax as cx
from curvax.device import programs, storage
from curvax.krylov.lanczos import Lanczos

OUTLIERS = [30.1, 24.3, 19.2, 15.7, 12.3, 9.6, 7.5, 5.9, 4.8, 4.1, 3.6, 3.2, 2.9, 2.5]
NEGATIVE = [-17.0, -13.2, -10.1, -7.9, -6.2, -4.5, -3.7, -3.1, -2.2]
HALF, BRAIN = storage.floor(np.float16), storage.floor(jnp.bfloat16)


def network_spectrum(n):
    """A network's: some outliers, a heavy bulk at zero, a negative tail."""
    rng = np.random.default_rng(n)
    bulk = n - len(OUTLIERS) - len(NEGATIVE)
    bulk = 0.3 * rng.standard_normal(bulk) * rng.exponential(1, bulk)
    return np.concatenate([OUTLIERS, NEGATIVE, bulk])


@functools.lru_cache
def network_matrix(n):
    """A float64 matrix with that spectrum in a random basis, and a float32 operator of it."""
    basis, _ = np.linalg.qr(np.random.default_rng(n + 1).normal(size=(n, n)))
    full = (basis * network_spectrum(n)) @ basis.T
    full = (full + full.T) / 2
    narrow = jnp.asarray(full, jnp.float32)
    return full, cx.from_matvec(lambda v: jnp.dot(narrow, v, precision="highest"), n)


def network_operator(n):
    """The same for large n: eigenvectors from cosines with random signs."""
    rng = np.random.default_rng(n + 2)
    values = jnp.asarray(rng.permutation(network_spectrum(n)), jnp.float32)
    signs = jnp.asarray(rng.choice([-1, 1], n), jnp.float32)

    def matvec(v):
        return signs * idct(values * dct(signs * v, norm="ortho"), norm="ortho")

    return cx.from_matvec(matvec, n)


class TestEigenvalues:
    @pytest.mark.thin(4)
    @pytest.mark.parametrize("certify", ["residuals", "complete"])
    @pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
    @pytest.mark.parametrize("n, block", [(301, 1), (1000, 1), (301, 2), (501, 4)])
    def test_float16_keeps_them_to_a_millionth(self, n, block, which, certify):
        """With restarts."""
        full, op = network_matrix(n)
        result = cx.eigsh(
            op, 5, which=which, tol=0, seed=0, basis_dtype="float16", certify=certify,
            block_size=block, max_basis=5 + 8 * block,
        )  # fmt: skip
        truth = wanted(network_spectrum(n), 5, which)
        np.testing.assert_allclose(result.eigenvalues, truth, rtol=1e-6)
        assert result.all_converged and result.num_restarts > 0
        assert result.complete is (True if certify == "complete" else None)
        np.testing.assert_allclose(
            result.residuals, true_residuals(full, result), rtol=1e-2, atol=1e-4
        )

    @pytest.mark.parametrize("block", [1, 2, 4])
    def test_the_smallest_basis_rounds_at_many_restarts(self, block):
        """The roundings add up in squares."""
        op = network_matrix(301)[1]
        result = cx.eigsh(
            op, 5, seed=0, basis_dtype="float16", block_size=block, max_basis=5 + 4 * block,
            tol=5e-4,
        )  # fmt: skip
        assert result.num_restarts > 2 and result.all_converged
        truth = wanted(network_spectrum(301), 5, "LM")
        np.testing.assert_allclose(result.eigenvalues, truth, rtol=0, atol=2e-6 * 30.1)

    def test_sampled(self):
        """Ritz values, which the overlaps of rounded rows move: of spread ones by about 4e-4/√n."""
        n = 200_001
        result = cx.eigsh(
            network_operator(n), 5, seed=0, basis_dtype="float16", certify="sampled", tol=0,
            max_basis=20,
        )  # fmt: skip
        assert result.num_verification == 3 and result.all_converged
        truth = wanted(network_spectrum(n), 5, "LM")
        np.testing.assert_allclose(result.eigenvalues, truth, rtol=0, atol=1e-6 * 30.1)

    @pytest.mark.parametrize("dtype, error", [("float16", 1e-6), ("bfloat16", 1e-5)])
    def test_above_the_floor_nothing_else_changes(self, dtype, error):
        """As many products, and values that differ by the square of a rounding."""
        op = network_matrix(1000)[1]
        narrow = cx.eigsh(op, 5, seed=0, basis_dtype=dtype, tol=5e-3)
        wide = cx.eigsh(op, 5, seed=0, tol=5e-3)
        assert narrow.num_matvecs == wide.num_matvecs and (narrow.tol_effective == 5e-3).all()
        np.testing.assert_allclose(narrow.eigenvalues, wide.eigenvalues, rtol=0, atol=error * 30.1)


class TestFloor:
    @pytest.mark.parametrize("dtype, floor", [("float16", HALF), ("bfloat16", BRAIN)])
    def test_a_smaller_tolerance_is_raised_with_a_warning(self, dtype, floor):
        op = network_matrix(301)[1]
        message = f"tol = 1e-05 is below what a basis stored in {dtype} allows; .*'float32'"
        with pytest.warns(cx.ConvergenceWarning, match=message):
            result = cx.eigsh(op, 5, seed=0, basis_dtype=dtype, tol=1e-5, max_basis=80)
        assert (result.tol_effective == floor).all() and result.all_converged
        # Rounding shows in what is measured, and the floor is no more than it takes.
        assert 0.5 * floor < result.residuals.max() / 30.1 <= floor

    def test_their_sizes(self):
        assert HALF == pytest.approx(3.1e-4, rel=0.05) and BRAIN == pytest.approx(8 * HALF)
        assert storage.floor(np.float32) == storage.floor(np.float64) == 0

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_roundoff(self, dtype):
        x = np.random.default_rng(0).normal(size=10**5)
        error = np.linalg.norm(x.astype(jnp.dtype(dtype)).astype(float) - x) / np.linalg.norm(x)
        assert error == pytest.approx(storage.roundoff(dtype), rel=0.02)

    def test_zero_asks_for_the_floor_silently(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = cx.eigsh(
                network_matrix(301)[1], 3, seed=0, basis_dtype="float16", tol=0, max_basis=60
            )
        assert (result.tol_effective == HALF).all()


class TestStoredRows:
    @pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, "float16"])
    def test_what_is_returned_is_what_was_stored_and_multiplied(self, dtype):
        full, op = network_matrix(301)
        result = cx.eigsh(op, 4, seed=0, basis_dtype=dtype, max_basis=80, tol=5e-3)
        vectors = np.asarray(result.eigenvectors)
        assert vectors.dtype == np.float32
        stored = vectors * storage.scale(jnp.dtype(dtype), 301)
        np.testing.assert_array_equal(stored.astype(jnp.dtype(dtype)).astype(np.float32), stored)
        wide = vectors.astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(wide, axis=1), 1, rtol=1e-3)
        quotients = np.einsum("ki,ij,kj->k", wide, full, wide) / np.sum(wide**2, axis=1)
        np.testing.assert_allclose(result.eigenvalues, quotients, rtol=3e-7)

    @pytest.mark.parametrize("n", [1, 2, 77, 10**4, 10**6, 134_515_008, 10**10])
    def test_scale(self, n):
        scale = storage.scale(np.float16, n)
        assert np.log2(scale) == int(np.log2(scale)) and storage.scale(jnp.bfloat16, n) == 1
        assert np.isfinite(np.float16(scale))  # a unit vector along an axis
        if n < 2**31:
            assert 0.7 <= scale / np.sqrt(n) <= 1.42

    def test_scaling_keeps_small_entries(self):
        """Entries of a unit vector of 10⁹ dimensions, most of which float16 cannot hold."""
        n = 10**9
        x = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32) / np.sqrt(n)
        scaled = (x * storage.scale(np.float16, n)).astype(np.float16)
        back = np.asarray(storage.vectors(jnp.asarray(scaled), n))
        plain = x.astype(np.float16).astype(np.float32)
        errors = [np.linalg.norm(y - x) / np.linalg.norm(x) for y in (back, plain)]
        assert errors[0] < 2.2e-4 and errors[1] > 4e-4

    def test_rows_that_change_their_length_are_not_taken_for_asymmetry(self):
        """Entries all alike round alike: u by +0.39 % and v by -0.34 % in bfloat16."""
        sizes, n = (1016, 1017), 2200
        u, v = np.zeros((2, n))
        u[: sizes[0]], v[sizes[0] : sum(sizes)] = sizes[0] ** -0.5, sizes[1] ** -0.5
        rest = np.zeros(n)
        rest[sum(sizes) :] = np.linspace(-0.3, 0.3, n - sum(sizes))
        a, b, d = (jnp.asarray(x, jnp.float32) for x in (u, v, rest))
        op = cx.from_matvec(lambda x: 5 * (jnp.dot(a, x) * b + jnp.dot(b, x) * a) + d * x, n)
        result = cx.eigsh(op, 2, v0=u, seed=0, basis_dtype="bfloat16", tol=1e-2, max_basis=40)
        np.testing.assert_allclose(result.eigenvalues, [5, -5], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", np.float32])
def test_an_operator_in_float64_keeps_its_dtype(dtype):
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="basis_dtype must be one of float64, for an operator"):
            cx.eigsh(np.eye(9), 1, basis_dtype=dtype)


class TestPadding:
    """Rows begin at multiples of 128 bytes, and what fills them up is read by nobody."""

    @pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, np.float32, np.float64])
    @pytest.mark.parametrize("n", [1, 31, 64, 301, 50257])
    def test_shape(self, n, dtype):
        rows, columns = storage.shape(7, n, dtype)
        size = jnp.dtype(dtype).itemsize
        assert rows == 7 and columns * size % 128 == 0 and 0 <= (columns - n) * size < 128

    @pytest.fixture
    def poison(self, monkeypatch):
        """NaN in the padding of every row, from the beginning and after every program."""

        def poisoned(fun):
            def call(state, *args, **options):
                result = fun(state, *args, **options)
                assert state.basis.shape[1] > state.n
                state.basis = state.basis.at[:, state.n :].set(jnp.nan)
                return result

            return call

        def install():
            for name in ("__init__", "start", "step", "restart"):
                monkeypatch.setattr(Lanczos, name, poisoned(getattr(Lanczos, name)))

        return install

    @pytest.mark.thin(4)
    @pytest.mark.parametrize(
        "dtype, implementation",
        [
            *((dtype, "auto") for dtype in ("float16", "bfloat16", "float32", "float64")),
            ("float16", "reference"),
            *(
                pytest.param(dtype, "reference", marks=pytest.mark.slow)
                for dtype in ("bfloat16", "float32", "float64")
            ),
        ],
    )
    def test_nothing_reads_it(self, monkeypatch, poison, dtype, implementation):
        """Nor do its numbers reach the results, to the last bit."""
        monkeypatch.setenv("CURVAX_IMPL", implementation)
        full, op = network_matrix(301)

        def solve(certify):
            result = cx.eigsh(
                full if dtype == "float64" else op, 3, seed=0, max_basis=13, block_size=2, tol=5e-3,
                basis_dtype=dtype, certify=certify,
            )  # fmt: skip
            assert result.num_restarts > 0
            return result

        with jax.enable_x64(dtype == "float64"):
            clean = [solve("sampled"), solve("complete")]
            poison()
            for before, after in zip(clean, [solve("sampled"), solve("complete")], strict=True):
                for name in ("eigenvalues", "residuals", "eigenvectors"):
                    pair = (np.asarray(getattr(result, name)) for result in (before, after))
                    np.testing.assert_array_equal(*pair)
                assert before.orthogonality == after.orthogonality < 0.01
                assert before.num_matvecs == after.num_matvecs


class TestOrthogonalisation:
    """The last update is left out where the deviation measured before it is below eps / 16."""

    @pytest.mark.parametrize("block", [1, 2])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_most_steps_read_the_basis_twice(self, dtype, block, monkeypatch):
        deviations, unpack = [], programs.unpack

        def observed(numbers, block):
            deviations.append(numbers[2])
            return unpack(numbers, block)

        monkeypatch.setattr(programs, "unpack", observed)
        op, options = network_operator(20_001), {"seed": 0, "tol": 3e-3, "block_size": block}
        result = cx.eigsh(op, 5, basis_dtype=dtype, max_basis=30, **options)
        left = np.array(deviations) < float(jnp.finfo(dtype).eps) / 16
        assert left.mean() >= 0.6, deviations
        wide = cx.eigsh(op, 5, basis_dtype="float32", max_basis=30, **options)
        assert result.all_converged and result.num_matvecs <= wide.num_matvecs + block
        assert result.orthogonality <= 2 * storage.roundoff(dtype)

    @pytest.mark.parametrize(
        ("dtype", "how"), [("float16", "lazy"), ("bfloat16", "lazy"), ("float32", "full")]
    )
    def test_only_a_basis_in_16_bits_leaves_updates_out(self, dtype, how, monkeypatch):
        asked, kernel = [], programs.orthonormalize_block

        def observed(*arguments, **options):
            asked.append(options["reorthogonalize"])
            return kernel(*arguments, **options)

        monkeypatch.setattr(programs, "orthonormalize_block", observed)
        basis = jax.ShapeDtypeStruct(storage.shape(9, 500, dtype), jnp.dtype(dtype))
        block = jax.ShapeDtypeStruct((1, 500), np.float32)
        seed = np.zeros(2, np.uint32)
        with jax.enable_x64(True):
            jax.eval_shape(programs.orthonormalize.fun, basis, block, np.int32(0), seed)
        assert asked == [how]
