"""The Lanczos recurrence against dense Lanczos in float64."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.krylov.spectra import SPECTRA, N, matrix

import curvax as cx
from curvax.krylov import recurrence
from curvax.memory import Memory

EPS = float(np.finfo(np.float32).eps)
START = np.random.default_rng(3).normal(size=N)


def narrow(name):
    """The float32 matrix, and the same numbers in float64."""
    a = np.asarray(matrix(name), np.float32)
    return a, a.astype(np.float64)


def dense_lanczos(a, start, steps):
    """αs and βs (the last coupling too) of Lanczos in float64, reorthogonalised twice."""
    rows = [start / np.linalg.norm(start)]
    alphas, betas = [], []
    for _ in range(steps):
        w = a @ rows[-1]
        alphas.append(rows[-1] @ w)
        for _ in range(2):
            w -= np.transpose(rows) @ (np.asarray(rows) @ w)
        betas.append(np.linalg.norm(w))
        rows.append(w / betas[-1])
    return np.asarray(alphas), np.asarray(betas)


def quadrature(result):
    """Nodes and weights of a result's T."""
    t = np.diag(result.alphas) + np.diag(result.betas, 1) + np.diag(result.betas, -1)
    nodes, vectors = np.linalg.eigh(t)
    return nodes, vectors[0] ** 2


def assert_same_measure(result, a, start, tolerance):
    """The Gaussian averages of T's measure are those of the start's, at several widths."""
    values, vectors = np.linalg.eigh(a)
    masses = (vectors.T @ start) ** 2 / (start @ start)
    nodes, weights = quadrature(result)
    scale = np.abs(values).max() or 1.0
    x = np.linspace(-1.2, 1.2, 200)[:, None] * scale
    for width in (0.3, 0.1, 0.05):
        ours, truth = (
            np.exp(-0.5 * ((x - points) / (width * scale)) ** 2) @ masses_
            for points, masses_ in ((nodes, weights), (values, masses))
        )
        np.testing.assert_allclose(ours, truth, rtol=0, atol=tolerance)


@pytest.mark.parametrize("full", [False, True])
class TestCoefficients:
    def test_float64_are_those_of_dense_lanczos(self, full):
        with jax.enable_x64(True):
            a = jnp.asarray(matrix("outliers"))
            result = cx.lanczos_tridiagonal(a, 20, v0=START, reorthogonalize=full)
        alphas, betas = dense_lanczos(matrix("outliers"), START, 20)
        np.testing.assert_allclose(result.alphas, alphas, rtol=0, atol=1e-9)
        np.testing.assert_allclose(result.betas, betas[:-1], rtol=0, atol=1e-9)
        np.testing.assert_allclose(result.last_beta, betas[-1], rtol=0, atol=1e-9)
        assert result.num_matvecs == 20 and result.seed is None and result.basis is None

    def test_float32_begin_as_those_of_dense_lanczos(self, full):
        a, wide = narrow("outliers")
        result = cx.lanczos_tridiagonal(a, 8, v0=START, reorthogonalize=full)
        alphas, betas = dense_lanczos(wide, START, 8)
        np.testing.assert_allclose(result.alphas, alphas, rtol=0, atol=100 * EPS * 20)
        np.testing.assert_allclose(result.betas, betas[:-1], rtol=0, atol=100 * EPS * 20)
        assert result.alphas.dtype == result.betas.dtype == np.float64

    @pytest.mark.parametrize("name", SPECTRA)
    def test_the_quadrature_is_right_where_orthogonality_is_lost(self, full, name):
        a, wide = narrow(name)
        result = cx.lanczos_tridiagonal(a, 60, v0=START, reorthogonalize=full)
        assert_same_measure(result, wide, START, 30 * EPS)

    @pytest.mark.parametrize("name, distinct", [("identity", 1), ("zero", 1), ("two values", 2)])
    def test_an_invariant_space_ends_it(self, full, name, distinct):
        result = cx.lanczos_tridiagonal(narrow(name)[0], 60, seed=0, reorthogonalize=full)
        assert len(result.alphas) == result.num_matvecs == distinct and result.last_beta == 0
        nodes, _ = quadrature(result)
        np.testing.assert_allclose(nodes, np.unique(SPECTRA[name]), rtol=20 * EPS, atol=20 * EPS)

    @pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
    def test_rank_three_at_any_scale(self, full, scale):
        factors = np.random.default_rng(0).normal(size=(N, 3))
        a = np.asarray(scale * (factors * [1, -2, 3]) @ factors.T, np.float32)
        result = cx.lanczos_tridiagonal(a, 30, v0=START, reorthogonalize=full)
        assert_same_measure(result, a.astype(np.float64), START, 30 * EPS)
        if full:
            assert len(result.alphas) == 4 and result.last_beta == 0

    @pytest.mark.parametrize("n", [1, 2, 7])
    def test_no_more_than_n_steps(self, full, n):
        values = np.arange(1.0, n + 1)
        a = np.asarray(np.diag(values), np.float32)
        result = cx.lanczos_tridiagonal(a, 50, v0=np.ones(n), reorthogonalize=full)
        assert len(result.alphas) <= n and result.last_beta <= 100 * EPS * n
        np.testing.assert_allclose(quadrature(result)[0], values, rtol=100 * EPS)

    def test_not_finite_names_the_product_and_the_leaf(self, full):
        def matvec(tree):
            large = jnp.where(jnp.arange(60) < 2, 1e30, 1.0)
            return {"good": tree["good"], "bad": tree["bad"] * large * large}

        like = {"good": np.ones(100, np.float32), "bad": np.ones(60, np.float32)}
        op = cx.from_matvec(matvec, like)
        with pytest.raises(FloatingPointError, match=r"product 1 .*in: bad \(2 of 60\)"):
            cx.lanczos_tridiagonal(op, 5, seed=0, reorthogonalize=full)

    def test_seeds(self, full):
        a = narrow("outliers")[0]
        drawn = cx.lanczos_tridiagonal(a, 6, reorthogonalize=full)
        again = cx.lanczos_tridiagonal(a, 6, reorthogonalize=full, seed=drawn.seed)
        other = cx.lanczos_tridiagonal(a, 6, reorthogonalize=full)
        np.testing.assert_array_equal(drawn.alphas, again.alphas)
        assert not np.array_equal(drawn.alphas, other.alphas)

    def test_ctrl_c_returns_the_steps_made(self, full):
        calls = []

        def matvec(v):
            calls.append(None)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return matrix("outliers") @ v

        from scipy.sparse.linalg import LinearOperator

        op = LinearOperator((N, N), matvec=matvec, dtype=np.float32)
        with pytest.warns(cx.InterruptWarning):
            result = cx.lanczos_tridiagonal(op, 30, v0=START, reorthogonalize=full)
        alphas, _ = dense_lanczos(matrix("outliers"), START, 4)
        np.testing.assert_allclose(result.alphas, alphas, rtol=0, atol=100 * EPS * 20)
        assert result.num_matvecs == 4 and result.last_beta > 0


class TestBasis:
    @pytest.mark.parametrize("name", ["outliers", "both signs", "repeated", "clustered", "small"])
    def test_reorthogonalised(self, name):
        """A Qᵀ = Qᵀ T + β q eᵀ with Q orthonormal, q a unit vector orthogonal to Q."""
        a, wide = narrow(name)
        result = cx.lanczos_tridiagonal(a, 60, seed=1, reorthogonalize=True, return_basis=True)
        q, scale = np.asarray(result.basis, np.float64), np.abs(SPECTRA[name]).max()
        assert q.shape == (len(result.alphas), N)
        np.testing.assert_allclose(q @ q.T, np.eye(len(q)), rtol=0, atol=20 * EPS)
        t = np.diag(result.alphas) + np.diag(result.betas, 1) + np.diag(result.betas, -1)
        rest = wide @ q.T - q.T @ t
        last = rest[:, -1].copy()
        assert abs(np.linalg.norm(last) - result.last_beta) <= 30 * EPS * scale
        assert np.abs(q @ last).max() <= 30 * EPS * scale
        assert np.linalg.norm(rest[:, :-1], axis=0).max() <= 30 * EPS * scale

    def test_of_the_plain_recurrence(self):
        """It satisfies the recurrence, but loses its orthogonality once a value has converged."""
        a, wide = narrow("outliers")
        result = cx.lanczos_tridiagonal(a, 60, seed=1, return_basis=True)
        q = np.asarray(result.basis, np.float64)
        t = np.diag(result.alphas) + np.diag(result.betas, 1) + np.diag(result.betas, -1)
        rest = wide @ q.T - q.T @ t
        assert np.linalg.norm(rest[:, :-1], axis=0).max() <= 30 * EPS * 20
        np.testing.assert_allclose(np.linalg.norm(q, axis=1), 1, rtol=0, atol=EPS)
        assert np.abs(q @ q.T - np.eye(60)).max() > 0.1

    def test_ghosts_only_without_reorthogonalisation(self):
        a = narrow("outliers")[0]
        plain, full = (
            quadrature(cx.lanczos_tridiagonal(a, 60, seed=1, reorthogonalize=kind))[0]
            for kind in (False, True)
        )
        assert np.sum(np.abs(plain - 20) < 1e-3) > 1 == np.sum(np.abs(full - 20) < 1e-3)

    def test_all_steps_give_all_eigenvalues(self):
        a, wide = narrow("outliers")
        result = cx.lanczos_tridiagonal(a, N, seed=1, reorthogonalize=True, return_basis=True)
        values = np.linalg.eigvalsh(wide)
        np.testing.assert_allclose(quadrature(result)[0], values, rtol=0, atol=30 * EPS * 20)
        assert result.last_beta == 0 and result.basis.shape == (N, N)

    def test_a_shorter_basis_where_the_space_is_invariant(self):
        for full in (False, True):
            result = cx.lanczos_tridiagonal(
                narrow("two values")[0], 30, seed=0, reorthogonalize=full, return_basis=True
            )
            assert result.basis.shape == (2, N)

    def test_is_refused_where_it_does_not_fit(self, monkeypatch):
        monkeypatch.setattr("curvax.memory.memory_of", lambda op: Memory(1000 * op.shape[0] // 16))
        a = narrow("outliers")[0]
        assert len(cx.lanczos_tridiagonal(a, 30, seed=0).alphas) == 30
        for options in ({"return_basis": True}, {"reorthogonalize": True}):
            with pytest.raises(MemoryError, match="need 19.20 kB, but 10.00 kB are free: lower"):
                cx.lanczos_tridiagonal(a, 30, seed=0, **options)


def test_starts():
    """A pytree start, flat starts, and vectors that are far from unit length."""
    diagonal = jnp.arange(1.0, 11)

    def matvec(tree):
        product = diagonal * jnp.concatenate([tree["x"], tree["y"]])
        return {"x": product[:4], "y": product[4:]}

    op = cx.from_matvec(matvec, {"x": np.ones(4, np.float32), "y": np.ones(6, np.float32)})
    expected = dense_lanczos(np.diag(np.arange(1.0, 11)), np.arange(1.0, 11), 5)[0]
    flat = np.arange(1.0, 11)
    for v0 in (flat, {"x": 1e20 * flat[:4], "y": 1e20 * flat[4:]}, 1e-30 * flat[None]):
        result = cx.lanczos_tridiagonal(op, 5, v0=v0)
        np.testing.assert_allclose(result.alphas, expected, rtol=1e-5)


def test_the_recurrence_needs_no_scratch_of_the_length_of_a_vector():
    """Three vectors of a run are all: each program works in the memory of what it is given."""
    n, clock = 3_000_001, recurrence.Clock("recurrence")
    vector, small = jax.ShapeDtypeStruct((1, n), np.float32), np.zeros(1)
    for program, arguments in (
        (recurrence.subtract, (vector, vector, vector, small)),
        (recurrence.advance, (vector, small, small)),
        (recurrence.normalize, (vector,)),
    ):
        assert program.work_bytes(clock, *arguments) < 28 * 2**16 < 4 * n


def test_traced():
    with pytest.raises(TypeError, match="lanczos_tridiagonal runs on the host: call it outside"):
        jax.jit(lambda a: cx.lanczos_tridiagonal(a, 3).alphas)(jnp.eye(4))


@pytest.mark.parametrize(
    "steps, options, error, message",
    [
        (0, {}, ValueError, "num_steps must be at least 1, got 0"),
        (2.0, {}, TypeError, "num_steps must be an integer"),
        (None, {}, TypeError, "num_steps must be an integer"),
        (3, {"seed": -1}, ValueError, "seed must be at least 0"),
        (3, {"seed": "a"}, TypeError, "seed must be an integer"),
        (3, {"reorthogonalize": 1}, TypeError, "reorthogonalize must be True or False, got 1"),
        (3, {"return_basis": None}, TypeError, "return_basis must be True or False, got None"),
        (3, {"v0": np.ones((2, 4))}, ValueError, "v0 must be one vector, got a block of 2"),
        (3, {"v0": np.ones(5)}, ValueError, r"v0 must have shape \(4,\), got \(5,\)"),
        (3, {"v0": np.zeros(4)}, ValueError, "v0 must be finite and not zero"),
        (3, {"v0": np.full(4, np.nan)}, ValueError, "v0 must be finite and not zero"),
        (3, {"v0": 1j * np.ones(4)}, TypeError, "v0 must be real, got complex"),
    ],
)
def test_bad_arguments(steps, options, error, message):
    with pytest.raises(error, match=message):
        cx.lanczos_tridiagonal(np.eye(4, dtype=np.float32), steps, **options)
