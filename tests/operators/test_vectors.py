"""Every function that takes vectors takes the same ones, and refuses others in the same words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.arrays import scale_of, unit_rows
from curvax.operators.vectors import read_rows, read_vector, space_like

LIKE = {"b": np.zeros(2, np.float32), "w": np.zeros((2, 2), np.float32)}
N = 6
ROWS = np.arange(1.0, 1 + 2 * N).reshape(2, N)
OP = cx.from_matvec(lambda v: jax.tree.map(lambda x: 2 * x, v), LIKE)


def tree(rows):
    """Vectors of the structure of `LIKE`, from flat ones."""
    lead = rows.shape[:-1]
    return {"b": rows[..., :2], "w": rows[..., 2:].reshape(*lead, 2, 2)}


def result_of(rows):
    found = cx.eigsh(np.diag(np.arange(1.0, 1 + N)).astype(np.float32), 2, seed=0)
    object.__setattr__(found, "eigenvectors", tree(np.asarray(rows, np.float32)))
    return found


SAME = [ROWS, ROWS.astype(np.float32), jnp.asarray(ROWS, jnp.float32), tree(ROWS), result_of(ROWS)]


@pytest.mark.parametrize("value", SAME, ids=["float64", "float32", "jax", "tree", "result"])
def test_blocks_are_read_alike(value):
    rows = read_rows(OP.space, value, "x")
    assert rows.dtype == OP.dtype
    np.testing.assert_array_equal(rows, ROWS)


@pytest.mark.parametrize("value", [ROWS[0], ROWS[:1], tree(ROWS[0]), tree(ROWS[:1])])
def test_one_vector_is_read_alike(value):
    np.testing.assert_array_equal(read_vector(OP.space, value, "x"), ROWS[0])
    np.testing.assert_array_equal(read_rows(OP.space, value, "x"), ROWS[:1])


def test_flat_vectors_of_a_matrix_shaped_leaf():
    space = space_like(np.zeros((2, 3), np.float32))
    for value in (ROWS, ROWS.reshape(2, 2, 3)):
        np.testing.assert_array_equal(read_rows(space, value, "x"), ROWS)
    np.testing.assert_array_equal(read_vector(space, ROWS[0].reshape(2, 3), "x"), ROWS[0])


# A function that reads vectors, and what it calls them.
READERS = {
    "v0": lambda x: cx.eigsh(OP, 1, v0=x),
    "v0 of one": lambda x: cx.lanczos_tridiagonal(OP, 2, v0=x),
    "b": lambda x: cx.solve(OP, x),
    "diagonal": lambda x: OP.congruence(x),
    "vectors": lambda x: OP.project_off(x),
}
WITHOUT = cx.eigsh(np.eye(N, dtype=np.float32), 1, return_eigenvectors=False)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "value, error, message",
    [
        (np.ones(N + 1), ValueError, r", as a flat array, must have shape \(6,\) or \(b, 6\), got"),
        (np.ones((0, N)), ValueError, " must have at least one vector, got a block of none"),
        (np.ones(N) * 1j, TypeError, " must be real, got complex"),
        ("ones", TypeError, " must be made of real numbers, got 'ones'"),
        ({"b": np.ones(2)}, ValueError, " must have the structure"),
        (None, TypeError, " must be a vector, a block of vectors, or a result with eigenvectors"),
        (WITHOUT, TypeError, " is a result without eigenvectors: solve with return_eigenvectors"),
    ],
    ids=["length", "none", "complex", "text", "structure", "None", "result"],
)
def test_others_are_refused_in_the_same_words(reader, value, error, message):
    if value is None and reader.startswith("v0"):
        return  # a random one
    with pytest.raises(error, match=f"^{reader.split()[0]}{message}"):
        READERS[reader](value)


@pytest.mark.parametrize("reader", ["v0", "v0 of one", "b", "vectors"])
@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf])
def test_vectors_without_a_direction(reader, entry):
    with pytest.raises(ValueError, match=f"^{reader.split()[0]} must be finite and not zero"):
        READERS[reader](np.full(N, entry))


@pytest.mark.parametrize("reader", ["v0 of one", "b", "diagonal"])
def test_one_vector_is_asked_for(reader):
    with pytest.raises(ValueError, match="must be one vector, got a block of 2"):
        READERS[reader](tree(ROWS))


def test_deflate_is_read_alike():
    with pytest.raises(TypeError, match="^deflate is a result without eigenvectors: solve with"):
        cx.trace(OP, num_matvecs=2, method="hutchinson", deflate=WITHOUT)


@pytest.mark.parametrize("make", [lambda x: cx.from_matvec(lambda v: v, x), cx.identity])
def test_likes_are_read_alike(make):
    struct = jax.ShapeDtypeStruct((N,), np.float32)
    assert {make(like).space for like in (N, np.int64(N), np.zeros(N, np.float32), struct)} == {
        cx.identity(N).space
    }
    assert make(OP).space == make(LIKE).space == OP.space
    for like in (None, True, "6", {"a": 1}):
        with pytest.raises(TypeError, match="^like must be an operator, an integer n, an array, a"):
            make(like)
    for like in (0, {}, np.zeros((0, 2), np.float32)):
        with pytest.raises(ValueError, match="^like must .* at least"):
            make(like)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norms_whose_squares_leave_the_range(size):
    rows = jnp.asarray(ROWS * size, jnp.float32)
    units, _ = unit_rows(rows)
    expected = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    np.testing.assert_allclose(units, expected, rtol=4 * np.finfo(np.float32).eps)
    np.testing.assert_array_equal(scale_of(rows, axis=1), jnp.max(rows, axis=1, keepdims=True))


def test_the_scale_of_zero_is_one():
    assert scale_of(jnp.zeros(3)) == 1
    np.testing.assert_array_equal(scale_of(jnp.zeros((2, 3)), axis=1), np.ones((2, 1)))
