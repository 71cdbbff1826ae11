"""Operators from functions, dense arrays and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.linalg import LinearOperator

import curvax as cx
from curvax.operators.conversion import as_operator

N = 12


def _symmetric(seed=0, dtype=np.float32):
    a = np.random.default_rng(seed).normal(size=(N, N))
    return ((a + a.T) / 2).astype(dtype)


def test_from_matvec_on_flat_vectors_and_pytrees():
    a = _symmetric()
    flat = cx.from_matvec(lambda v: jnp.dot(a, v), N)
    np.testing.assert_allclose(flat @ jnp.ones(N), a.sum(axis=1), rtol=1e-5, atol=1e-6)

    def matvec(tree):
        out = jnp.dot(a, jnp.concatenate([tree["x"].ravel(), tree["y"]]))
        return {"x": out[:8].reshape(2, 4), "y": out[8:]}

    like = {"x": jax.ShapeDtypeStruct((2, 4), jnp.float32), "y": np.zeros(4, np.float32)}
    op = cx.from_matvec(matvec, like)
    block = op @ {"x": jnp.ones((3, 2, 4)), "y": jnp.ones((3, 4))}
    assert block["x"].shape == (3, 2, 4)
    np.testing.assert_allclose(block["y"][2], a.sum(axis=1)[8:], rtol=1e-5, atol=1e-6)
    assert op.ravel(like | {"x": np.zeros((2, 4), np.float32)}).shape == (N,)


def test_what_the_function_closes_over_is_data_of_the_operator():
    a = jnp.asarray(_symmetric())
    op = cx.from_matvec(lambda v: a @ v, N)
    assert any(leaf is a for leaf in jax.tree.leaves(op))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a: a,
        jnp.asarray,
        scipy.sparse.csr_array,
        lambda a: LinearOperator(a.shape, matvec=lambda v: a @ v, dtype=a.dtype),
    ],
    ids=["numpy", "jax", "sparse", "scipy"],
)
def test_every_kind_of_matrix(wrap):
    a = _symmetric()
    op = as_operator(wrap(a))
    eye = jnp.eye(N, dtype=jnp.float32)
    np.testing.assert_allclose(op @ eye, a, rtol=1e-6, atol=1e-6)
    inside = jax.jit(lambda v: jax.lax.scan(lambda c, x: (c, op @ x), 0, v)[1])(eye)
    np.testing.assert_allclose(inside, a, rtol=1e-6, atol=1e-6)


def test_float64_needs_x64():
    a = _symmetric(dtype=np.float64)
    with pytest.raises(ValueError, match="A is float64.*jax_enable_x64"):
        as_operator(a)
    with jax.enable_x64(True):
        np.testing.assert_allclose(as_operator(a) @ jnp.eye(N), a, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    "a, error, message",
    [
        (np.ones((3, 4), np.float32), ValueError, r"square.*\(3, 4\)"),
        (np.ones((0, 0), np.float32), ValueError, "not empty"),
        (np.eye(3, dtype=np.int32), TypeError, "int32"),
        (np.eye(3, dtype=np.complex64), TypeError, "complex64"),
        (np.triu(np.ones((3, 3), np.float32)), ValueError, "symmetric: max .* is 1"),
        (np.full((3, 3), np.nan, np.float32), ValueError, "finite"),
        (lambda v: v, TypeError, "from_matvec"),
        ("matrix", TypeError, "str"),
    ],
)
def test_bad_matrices(a, error, message):
    with pytest.raises(error, match=message):
        as_operator(a)


@pytest.mark.parametrize(
    "matvec, like, error, message",
    [
        (3, N, TypeError, "callable"),
        (lambda v: v[:-1], N, ValueError, "shapes of its argument"),
        (lambda v: {"x": v}, N, ValueError, "structure"),
        (lambda v: v, 0, ValueError, "like must be an integer n of at least 1, got 0"),
        (lambda v: v, -1, ValueError, "like must be an integer n of at least 1, got -1"),
        (lambda v: v, 10**19, ValueError, f"at most {2**48} numbers, got n = {10**19}"),
        (lambda v: v, {}, ValueError, "like must have at least one element"),
        (lambda v: v, np.zeros((0, 2), np.float32), ValueError, "at least one element"),
        (
            lambda v: v,
            True,
            TypeError,
            "like must be an operator, an integer n, an array.*, got True",
        ),
        (lambda v: v, 3.0, TypeError, "like must be .*, got 3.0"),
        (lambda v: v, "3", TypeError, "like must be .*, got '3'"),
        (lambda v: v, (3, 4), TypeError, r"like must be .*ShapeDtypeStruct.*, got 3 in leaf '0'"),
        (lambda v: v, np.float32, TypeError, "like must be .* got <class 'numpy.float32'>"),
        (lambda v: np.asarray(v) * 2, N, TypeError, "matvec must be traceable.*LinearOperator"),
        (lambda v: v * float(v[0]), N, TypeError, "matvec must be traceable.*jax.numpy"),
        (lambda v: v, np.zeros(3, np.int32), TypeError, "int32"),
        (lambda v: v > 0, N, TypeError, "bool"),
    ],
)
def test_bad_functions(matvec, like, error, message):
    with pytest.raises(error, match=message):
        cx.from_matvec(matvec, like)


class Host:
    """What `as_operator` takes besides SciPy's."""

    shape, dtype = (3, 3), np.dtype(np.float32)

    def __init__(self, matvec):
        self.matvec = matvec


def scipy_operator(matvec):
    return LinearOperator((3, 3), matvec=matvec, dtype=np.float32)


class Derived(LinearOperator):
    """With `_matvec` of its own, as SciPy documents."""

    def __init__(self, matvec):
        super().__init__(np.float32, (3, 3))
        self.given = matvec

    def _matvec(self, x):
        return self.given(x)


BAD_PRODUCTS = [
    (lambda v: None, TypeError, "array of 3 real numbers, got None: does it lack a return"),
    (lambda v: v * 1j, TypeError, r"got dtype complex64: if the imaginary .* \.real"),
    (lambda v: v.astype(np.complex128), TypeError, "got dtype complex128"),
    (lambda v: v[:2], ValueError, r"of shape \(3,\), got shape \(2,\)"),
    (lambda v: np.r_[v, v], ValueError, r"of shape \(3,\), got shape \(6,\)"),
    (lambda v: np.float32(3), ValueError, r"got shape \(\)"),
    (lambda v: np.outer(v, v), ValueError, r"got shape \(3, 3\)"),
    (lambda v: "abc", TypeError, "got 'abc'"),
    (lambda v: v.astype(object), TypeError, "real numbers, got ndarray"),
    (lambda v: [v, 1], TypeError, "real numbers, got"),
    (lambda v: np.ma.masked_array(v, mask=v > 0), TypeError, "got a masked array"),
]


@pytest.mark.parametrize("wrap", [Host, scipy_operator, Derived])
@pytest.mark.parametrize("matvec, error, message", BAD_PRODUCTS)
def test_what_a_host_function_returns_is_checked(wrap, matvec, error, message):
    with pytest.raises(error, match=message):
        as_operator(wrap(matvec)).products(np.ones((2, 3), np.float32))


@pytest.mark.parametrize("matvec, error, message", BAD_PRODUCTS[:2])
def test_it_is_checked_wherever_it_is_multiplied(matvec, error, message):
    """At once where one multiplies, also inside a sum, and in what solves and estimates."""
    op = as_operator(Host(matvec))
    for use in (
        lambda: op @ jnp.ones(3),
        lambda: op @ jnp.ones((2, 3)),
        lambda: cx.eigsh(Host(matvec), 1, seed=0),
        lambda: cx.trace(op + cx.identity(op), num_matvecs=4, seed=0),
    ):
        with pytest.raises(error, match=message):
            use()


@pytest.mark.parametrize("wrap", [Host, scipy_operator, Derived])
def test_columns_rows_and_integers_of_a_host_function_are_taken(wrap):
    d = np.asarray([1, 2, 3])
    for matvec in (
        lambda v: (d * v)[:, None],
        lambda v: (d * v)[None],
        lambda v: list(d * v),
        lambda v: (d * v).astype(np.float64),
        lambda v: (d * v).astype(int),
    ):
        rows = as_operator(wrap(matvec)).products(np.ones((2, 3), np.float32))
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, [d, d])


def test_an_error_of_a_host_function_is_its_own():
    def fails(v):
        raise RuntimeError("no such matrix")

    with pytest.raises(RuntimeError, match="no such matrix"):
        as_operator(Host(fails)) @ jnp.ones(3)


@pytest.mark.parametrize(
    "matvec, error, message",
    [
        (lambda v: None, ValueError, "structure and shapes of its argument"),
        (lambda v: v.astype(jnp.complex64), TypeError, "real floating values, got complex64"),
        (lambda v: 3.0, ValueError, "structure and shapes of its argument"),
        (lambda v: [1.0, 2.0, 3.0], ValueError, "structure and shapes of its argument"),
    ],
)
def test_what_a_traced_function_returns_is_checked(matvec, error, message):
    with pytest.raises(error, match=message):
        cx.from_matvec(matvec, 3)
