"""Sums, multiples, congruence and projection against dense float64 matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx

N = 23


def _symmetric(seed):
    a = np.random.default_rng(seed).normal(size=(N, N))
    return (a + a.T) / 2


def _operator(matrix, like=None):
    a = jnp.asarray(matrix)
    if like is None:
        return cx.from_matvec(lambda v: jnp.dot(a, v, precision="highest"), jnp.zeros(N, a.dtype))
    flat, unravel = ravel_pytree(like)
    return cx.from_matvec(
        lambda v: unravel(jnp.dot(a, ravel_pytree(v)[0], precision="highest")),
        like,
    )


def _dense(op):
    return np.asarray(op.product(jnp.eye(op.shape[0], dtype=op.dtype)), np.float64)


def _close(op, expected, eps=1.2e-7):
    error = np.abs(_dense(op) - expected).max()
    assert error <= 20 * eps * np.abs(expected).max(), error


A, B = _symmetric(0), _symmetric(1)


@pytest.fixture
def pair():
    return _operator(np.float32(A)), _operator(np.float32(B))


class TestSums:
    def test_every_combination(self, pair):
        a, b = pair
        _close(a + b, A + B)
        _close(a - b, A - B)
        _close(-a, -A)
        _close(2 * a + b / 4 - 0.5 * (a - 3 * b), 2 * A + B / 4 - 0.5 * (A - 3 * B))
        _close(a * np.float64(2), 2 * A)
        _close(np.float32(2) * a, 2 * A)
        _close(jnp.float32(2) * a, 2 * A)
        _close(a + 0.1 * cx.identity(a), A + 0.1 * np.eye(N))

    def test_nested_sums_are_one_sum(self, pair):
        a, b = pair
        assert len((2 * (a + b) - 3 * (b - a)).terms) == 4

    def test_another_coefficient_compiles_nothing_again(self, pair):
        a, _ = pair
        traces = []

        @jax.jit
        def product(op, block):
            traces.append(0)
            return op.product(block)

        for damping in (0.1, 0.2, jnp.float32(3)):
            out = product(a + damping * cx.identity(a), jnp.eye(N)[:1])
            np.testing.assert_allclose(out[0, 0], A[0, 0] + damping, rtol=1e-5)
        assert len(traces) == 1

    def test_float64(self):
        with jax.enable_x64(True):
            a, b = _operator(A), _operator(B)
            op = 3 * a - b + 1e-9 * cx.identity(a)
            assert op.dtype == np.float64
            _close(op, 3 * A - B + 1e-9 * np.eye(N), eps=2.2e-16)

    def test_damping_under_jit(self, pair):
        a, _ = pair
        value = jax.jit(lambda d: (a + d * cx.identity(a)) @ jnp.ones(N))(jnp.float32(2))
        np.testing.assert_allclose(value, A.sum(axis=1) + 2, rtol=1e-4, atol=1e-5)

    def test_spectra_of_sums(self, pair):
        a, b = pair
        result = cx.eigsh(a - 2 * b, 3, which="BE", tol=1e-5, seed=0)
        truth = np.linalg.eigvalsh(A - 2 * B)
        np.testing.assert_allclose(result.eigenvalues, truth[[-1, -2, 0]], rtol=1e-5)

    def test_identities(self):
        like = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
        assert cx.identity(like).shape == (10, 10) and cx.identity(7).shape == (7, 7)
        assert jax.tree.structure(cx.identity(like) @ like) == jax.tree.structure(like)

    @pytest.mark.parametrize(
        "make,error,message",
        [
            (lambda a: a + cx.identity(3), None, "the same vectors"),
            (lambda a: a + 1, TypeError, "unsupported operand"),
            (lambda a: a * np.ones(3), ValueError, r"one number, got shape \(3,\).*congruence"),
            (lambda a: a * a, TypeError, "multiplied by a real number"),
            (lambda a: a * "2", TypeError, "multiplied by a real number"),
            (lambda a: 1j * a, TypeError, "multiplied by a real number"),
            (lambda a: a * True, TypeError, "multiplied by a real number"),
            (lambda a: a * float("nan"), ValueError, "that is finite in float32, got nan"),
            (lambda a: cx.identity(0), ValueError, "an integer n of at least 1, got 0"),
            (lambda a: cx.identity(None), TypeError, "like must be an operator, an integer"),
            (lambda a: cx.identity({"a": 1}), TypeError, "like must be an operator, an integer"),
            (lambda a: cx.identity(jnp.ones(3, int)), TypeError, "real floating dtype"),
        ],
    )
    def test_bad_input(self, pair, make, error, message):
        with pytest.raises(error or ValueError, match=message):
            make(pair[0])

    def test_two_dtypes(self, pair):
        with jax.enable_x64(True), pytest.raises(TypeError, match="must have one dtype"):
            pair[0] + _operator(A)


class TestCongruence:
    def test_is_the_dense_product(self, pair):
        d = np.random.default_rng(2).normal(size=N)
        expected = d[:, None] * A * d
        _close(pair[0].congruence(jnp.asarray(d, jnp.float32)), expected)

    def test_of_a_pytree(self):
        like = {"a": jnp.ones((4, 5)), "b": jnp.ones(3)}
        d = {"a": jnp.full((4, 5), 2.0), "b": jnp.full(3, 0.5)}
        flat = np.r_[np.full(20, 2.0), np.full(3, 0.5)]
        _close(_operator(np.float32(A), like).congruence(d), flat[:, None] * A * flat)

    def test_preconditioned_hessian_is_that_of_rescaled_parameters(self):
        """`P^(-1/2) H P^(-1/2)`, as of Adam's preconditioner, from its definition."""
        second = np.abs(np.random.default_rng(3).normal(size=N)) + 0.1
        scale = jnp.asarray(1 / np.sqrt(np.sqrt(second) + 1e-8), jnp.float32)
        x = jnp.asarray(np.random.default_rng(4).normal(size=(50, N)), jnp.float32)

        def loss(w, batch):
            return jnp.mean(jnp.cosh(batch @ w))

        w = jnp.full(N, 0.1, jnp.float32)
        plain = cx.hessian(loss, w, x).congruence(scale)
        rescaled = cx.hessian(lambda u, batch: loss(scale * u, batch), w / scale, x)
        np.testing.assert_allclose(_dense(plain), _dense(rescaled), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "diagonal,message",
        [
            (jnp.ones(3), "diagonal must have"),
            (jnp.full(N, jnp.nan), "diagonal must be finite"),
            ({"a": jnp.ones(N)}, "diagonal must have the structure"),
        ],
    )
    def test_bad_input(self, pair, diagonal, message):
        with pytest.raises(ValueError, match=message):
            pair[0].congruence(diagonal)


class TestProjection:
    def test_is_the_dense_product(self, pair):
        # Of very different lengths, and far from orthogonal.
        x = np.random.default_rng(5).normal(size=(4, N))
        x[1] = 1e6 * (x[0] + 0.1 * x[1])
        q, _ = np.linalg.qr(x.T)
        p = np.eye(N) - q @ q.T
        op = pair[0].project_off(jnp.asarray(x, jnp.float32))
        assert np.abs(_dense(op) - p @ A @ p).max() <= 200 * 1.2e-7 * np.abs(A).max()

    def test_the_rest_of_the_spectrum(self, pair):
        found = cx.eigsh(pair[0], 3, tol=1e-6, seed=0)
        rest = cx.eigsh(pair[0].project_off(found), 3, tol=1e-5, seed=0)
        truth = np.linalg.eigvalsh(A)
        truth = truth[np.argsort(-np.abs(truth))][3:6]
        np.testing.assert_allclose(rest.eigenvalues, np.sort(truth)[::-1], rtol=1e-4)

    def test_vectors_whose_squares_underflow(self):
        v = jnp.asarray([[1e-25, 1e-25, 0, 0]], jnp.float32)
        rest = cx.identity(jnp.zeros(4)).project_off(v)
        expected = np.eye(4)
        expected[:2, :2] = [[0.5, -0.5], [-0.5, 0.5]]
        np.testing.assert_allclose(rest.product(jnp.eye(4)), expected, atol=1e-6)

    def test_one_vector_of_a_pytree(self):
        like = {"a": jnp.ones((4, 5)), "b": jnp.ones(3)}
        op = _operator(np.float32(A), like).project_off(like)
        out = op @ like
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(out)) < 1e-5

    @pytest.mark.parametrize(
        "vectors,message",
        [
            (jnp.zeros((1, N)), "finite and not zero"),
            (jnp.full((1, N), jnp.inf), "finite and not zero"),
            (jnp.ones((2, N)), "linearly independent"),
            (jnp.eye(N), f"fewer than n = {N}"),
            (jnp.ones(4), "vectors must have shape"),
        ],
    )
    def test_bad_input(self, pair, vectors, message):
        with pytest.raises(ValueError, match=message):
            pair[0].project_off(vectors)

    def test_a_result_without_vectors(self, pair):
        result = cx.eigsh(pair[0], 1, seed=0, return_eigenvectors=False)
        with pytest.raises(TypeError, match="without eigenvectors"):
            pair[0].project_off(result)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Laplacian(cx.Operator):
    """A user's own operator: the second difference on a ring."""

    strength: jax.Array
    space: cx.VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block):
        return self.strength * (
            2 * block - jnp.roll(block, 1, axis=1) - jnp.roll(block, -1, axis=1)
        )


class TestSubclass:
    def test_does_all_that_operators_do(self):
        n = 40
        op = Laplacian(jnp.float32(3), cx.VectorSpace.of(jnp.zeros(n), np.float32))
        truth = 3 * (2 - 2 * np.cos(2 * np.pi * np.arange(n) / n))
        result = cx.eigsh(op, 3, tol=1e-5, seed=0, block_size=2)
        np.testing.assert_allclose(result.eigenvalues, np.sort(truth)[::-1][:3], rtol=1e-5)
        np.testing.assert_allclose(op @ jnp.ones(n), np.zeros(n), atol=1e-6)
        damped = op + 2 * cx.identity(op)
        np.testing.assert_allclose(_dense(damped), _dense(op) + 2 * np.eye(n), rtol=1e-6)
