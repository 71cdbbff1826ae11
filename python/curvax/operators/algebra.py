"""What the algebra of operators is given: numbers, diagonal matrices, vectors to project off."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import to_array
from curvax.checks import shown
from curvax.filters import difference
from curvax.operators.space import VectorSpace, is_array


def coefficient(factor: Any, dtype: np.dtype[Any]) -> Array:
    """A number that an operator of a dtype is multiplied by.

    Raises:
        TypeError: `factor` is not a real number.
        ValueError: `factor` is an array, or not finite.
    """
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if not (number or is_array(factor)) or jnp.iscomplexobj(factor):
        raise TypeError(f"an operator is multiplied by a real number, got {shown(factor)}")
    if np.shape(factor) != ():
        raise ValueError(
            f"an operator is multiplied by one number, got shape {np.shape(factor)}: for a "
            "diagonal matrix on both sides use A.congruence(d), for a product with a vector A @ v"
        )
    # Not by the cast, of which NumPy warns.
    largest = float(np.finfo(dtype).max)
    if not isinstance(factor, jax.core.Tracer) and not abs(float(factor)) <= largest:
        raise ValueError(
            f"an operator is multiplied by a number that is finite in {dtype}, got {factor}"
        )
    return jnp.asarray(factor, dtype)


def diagonal_entries(space: VectorSpace, diagonal: Any) -> Array:
    """The entries of a diagonal matrix, `(n,)`; see `Operator.congruence`.

    Raises:
        ValueError: another structure or shape, or not finite.
    """
    flat = diagonal
    if not (is_array(diagonal) and np.shape(diagonal) == (space.n,)):
        flat = space.ravel(diagonal, what="diagonal")
    flat = to_array(flat, "diagonal", space.dtype)
    if not isinstance(flat, jax.core.Tracer) and not bool(jnp.isfinite(flat).all()):
        raise ValueError("diagonal must be finite, got NaN or infinite entries")
    return flat


def independent_rows(space: VectorSpace, vectors: Any) -> Array:
    """Orthonormal rows `(k, n)` that span what is projected off; see `Operator.project_off`.

    Raises:
        TypeError: a result without eigenvectors.
        ValueError: zero, not finite, linearly dependent, or as many as there are parameters.
    """
    own = getattr(vectors, "eigenvectors", vectors)
    if own is None:
        raise TypeError("vectors is a result without eigenvectors (return_eigenvectors=False)")
    if is_array(own) and np.shape(own)[-1:] == (space.n,) and np.ndim(own) in (1, 2):
        block = jnp.atleast_2d(to_array(own, "vectors", space.dtype))
    else:
        block = jnp.atleast_2d(space.ravel(own, batch_axes=int(space.is_block(own))))
    if block.shape[0] >= space.n:
        raise ValueError(f"vectors must be fewer than n = {space.n}, got {block.shape[0]}")
    return orthonormal_rows(block)


def project(vectors: Array, block: Array) -> Array:
    """`block (b, n)` less its components along the orthonormal rows `vectors (k, n)`."""
    inner = jnp.matmul(block, vectors.T, precision="highest")
    return block - jnp.matmul(inner, vectors, precision="highest")


def orthonormal_rows(block: Array) -> Array:
    """An orthonormal basis of the rows of `block (k, n)`, as many as are independent.

    By the eigenvectors of the Gram matrix, twice: the first pass leaves an error of eps times the
    condition.

    Raises:
        ValueError: a row that is zero or not finite, or rows that are dependent.
    """
    rows, norms = _unit_rows(block)
    if not bool(jnp.isfinite(norms).all()) or not bool((norms > 0).all()):
        raise ValueError("vectors must be finite and not zero")
    for _ in range(2):
        gram = np.asarray(_gram(rows), np.float64)
        values, basis = np.linalg.eigh(gram)
        if values[0] < 100 * np.finfo(rows.dtype).eps * len(gram):
            raise ValueError(
                f"vectors must be linearly independent, got {len(gram)} of which the Gram matrix "
                f"has the smallest eigenvalue {values[0]:.1e}: leave out those that repeat others"
            )
        mix = (basis / np.sqrt(values)) @ basis.T
        rows = jnp.matmul(jnp.asarray(mix, rows.dtype), rows, precision="highest")
    return rows


@jax.jit
def _unit_rows(block: Array) -> tuple[Array, Array]:
    """The rows divided by their norms, and those."""
    # Scaled first: the squares of small or large entries leave the range of float32.
    scaled = block / jnp.max(jnp.abs(block), axis=1, keepdims=True)
    norms = jnp.linalg.norm(scaled, axis=1)
    return scaled / norms[:, None], norms


@jax.jit
def _gram(rows: Array) -> Array:
    return jnp.matmul(rows, rows.T, precision="highest")


def check_same(first: VectorSpace, second: VectorSpace) -> None:
    """Refuse to add operators on different vectors.

    Raises:
        TypeError: a float32 and a float64 one.
        ValueError: another structure or other shapes.
    """
    if first.dtype != second.dtype:
        raise TypeError(
            f"operators that are added must have one dtype, got {first.dtype} and {second.dtype}"
        )
    if (first.treedef, first.shapes) != (second.treedef, second.shapes):
        raise ValueError(
            "operators that are added must act on the same vectors: expected "
            f"{difference(first.treedef, second.treedef)}; shapes {shown(first.shapes)} and "
            f"{shown(second.shapes)}"
        )
