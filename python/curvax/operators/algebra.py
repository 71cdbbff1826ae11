"""What the algebra of operators is given: numbers, diagonal matrices, vectors to project off."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import unit_rows
from curvax.checks import is_number, shown
from curvax.filters import difference
from curvax.operators.space import VectorSpace, is_array
from curvax.operators.vectors import check_lengths, read_rows, read_vector

_unit_rows = jax.jit(unit_rows)


def coefficient(factor: Any, dtype: np.dtype[Any]) -> Array:
    """A number that an operator of a dtype is multiplied by.

    Raises:
        TypeError: `factor` is not a real number.
        ValueError: `factor` is an array, or not finite.
    """
    if not (is_number(factor) or is_array(factor)) or jnp.iscomplexobj(factor):
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
        TypeError: not a vector of real numbers.
        ValueError: another structure or shape, or not finite.
    """
    flat = read_vector(space, diagonal, "diagonal")
    if not isinstance(flat, jax.core.Tracer) and not bool(jnp.isfinite(flat).all()):
        raise ValueError("diagonal must be finite, got NaN or infinite entries")
    return flat


def independent_rows(space: VectorSpace, vectors: Any) -> Array:
    """Orthonormal rows `(k, n)` that span what is projected off; see `Operator.project_off`.

    Raises:
        TypeError: a result without eigenvectors, or not made of real numbers.
        ValueError: zero, not finite, linearly dependent, or as many as there are parameters.
    """
    block = read_rows(space, vectors, "vectors")
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
    check_lengths(norms, "vectors")
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
