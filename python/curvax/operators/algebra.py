"""Operators made of operators: sums, multiples, congruence by a diagonal, projection."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import to_array
from curvax.checks import shown
from curvax.filters import difference
from curvax.operators.base import (
    Operator,
    VectorSpace,
    check_float_dtype,
    checked_product,
    is_array,
)
from curvax.operators.batches import for_several


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IdentityOperator(Operator):
    """The identity."""

    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Array) -> Array:
        """See `Operator.product`."""
        return block

    def at(self, params: Any, *, batches: Any = None) -> "IdentityOperator":
        """The same: it has no parameters."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SumOperator(Operator):
    """`Σ cᵢ Aᵢ`. The coefficients are data: another value compiles nothing again."""

    terms: tuple[Operator, ...]
    coefficients: tuple[Array, ...]
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Array) -> Array:
        """See `Operator.product`."""
        pairs = zip(self.coefficients, self.terms, strict=True)
        total: Array = sum(c.astype(self.dtype) * checked_product(term, block) for c, term in pairs)  # type: ignore[assignment]
        return total

    def at(self, params: Any, *, batches: Any = None) -> "SumOperator":
        """See `Operator.at`."""
        given = for_several(batches)
        terms = tuple(term.at(params, batches=given) for term in self.terms)
        return dataclasses.replace(self, terms=terms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CongruentOperator(Operator):
    """`D A D`, with a diagonal matrix D."""

    inner: Operator
    diagonal: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Array) -> Array:
        """See `Operator.product`."""
        d = self.diagonal[None]
        return d * checked_product(self.inner, d * block)

    def at(self, params: Any, *, batches: Any = None) -> "CongruentOperator":
        """See `Operator.at`; the diagonal entries stay."""
        return dataclasses.replace(self, inner=self.inner.at(params, batches=batches))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ProjectedOperator(Operator):
    """`P A P`, with the projection `P = I − XᵀX` off orthonormal rows X `(k, n)`."""

    inner: Operator
    vectors: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Array) -> Array:
        """See `Operator.product`."""
        return project(self.vectors, checked_product(self.inner, project(self.vectors, block)))

    def at(self, params: Any, *, batches: Any = None) -> "ProjectedOperator":
        """See `Operator.at`; the vectors stay."""
        return dataclasses.replace(self, inner=self.inner.at(params, batches=batches))


def project(vectors: Array, block: Array) -> Array:
    """`block (b, n)` less its components along the orthonormal rows `vectors (k, n)`."""
    inner = jnp.matmul(block, vectors.T, precision="highest")
    return block - jnp.matmul(inner, vectors, precision="highest")


def identity(like: Any) -> IdentityOperator:
    """Make an identity, to damp an operator with: `A + damping * cx.identity(A)`.

    Args:
        like: an operator, a pytree of real floating arrays, or an integer n for flat float32
            vectors.

    Raises:
        TypeError: none of these.
        ValueError: no element, or float64 with JAX's 64-bit mode off.
    """
    if isinstance(like, Operator):
        return IdentityOperator(like.space)
    if isinstance(like, (int, np.integer)) and not isinstance(like, bool):
        like = jax.ShapeDtypeStruct((int(like),), jnp.float32)
    leaves = jax.tree.leaves(like)
    if not leaves or not all(hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves):
        raise TypeError(
            f"like must be an operator, a pytree of arrays or an integer n, got {shown(like)}"
        )
    dtype = max((check_float_dtype(x.dtype, "like") for x in leaves), key=lambda d: d.itemsize)
    space = VectorSpace.of(like, dtype)
    if space.n < 1:
        raise ValueError(f"like must have at least one element, got {shown(like)}")
    return IdentityOperator(space)


def add(terms: Sequence[Operator]) -> SumOperator:
    """`Σ Aᵢ`; sums and multiples among the terms are taken apart.

    Raises:
        TypeError: float32 and float64 operators.
        ValueError: operators on different vectors.
    """
    flat: list[tuple[Array, Operator]] = []
    for term in terms:
        if isinstance(term, SumOperator):
            flat += zip(term.coefficients, term.terms, strict=True)
        else:
            flat.append((jnp.ones((), term.dtype), term))
    first = terms[0].space
    for term in terms[1:]:
        _check_same(first, term.space)
    return SumOperator(tuple(op for _, op in flat), tuple(c for c, _ in flat), first)


def scale(factor: Any, op: Operator) -> SumOperator:
    """`c A`.

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
    largest = float(np.finfo(op.dtype).max)
    if not isinstance(factor, jax.core.Tracer) and not abs(float(factor)) <= largest:
        raise ValueError(
            f"an operator is multiplied by a number that is finite in {op.dtype}, got {factor}"
        )
    c = jnp.asarray(factor, op.dtype)
    if isinstance(op, SumOperator):
        return SumOperator(op.terms, tuple(c * own for own in op.coefficients), op.space)
    return SumOperator((op,), (c,), op.space)


def congruence(op: Operator, diagonal: Any) -> CongruentOperator:
    """`D A D`; see `Operator.congruence`."""
    flat = diagonal
    if not (is_array(diagonal) and np.shape(diagonal) == (op.shape[0],)):
        flat = op.space.ravel(diagonal, what="diagonal")
    flat = to_array(flat, "diagonal", op.dtype)
    if not isinstance(flat, jax.core.Tracer) and not bool(jnp.isfinite(flat).all()):
        raise ValueError("diagonal must be finite, got NaN or infinite entries")
    return CongruentOperator(op, flat, op.space)


def project_off(op: Operator, vectors: Any) -> ProjectedOperator:
    """`P A P`; see `Operator.project_off`."""
    block = _flat_block(op, vectors)
    if block.shape[0] >= op.shape[0]:
        raise ValueError(f"vectors must be fewer than n = {op.shape[0]}, got {block.shape[0]}")
    return ProjectedOperator(op, orthonormal_rows(block), op.space)


def _flat_block(op: Operator, vectors: Any) -> Array:
    own = getattr(vectors, "eigenvectors", vectors)
    if own is None:
        raise TypeError("vectors is a result without eigenvectors (return_eigenvectors=False)")
    if is_array(own) and np.shape(own)[-1:] == (op.shape[0],) and np.ndim(own) in (1, 2):
        return jnp.atleast_2d(to_array(own, "vectors", op.dtype))
    return jnp.atleast_2d(op.ravel(own))


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


def _check_same(first: VectorSpace, second: VectorSpace) -> None:
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
