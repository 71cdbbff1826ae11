"""Operators made of operators: sums, multiples, congruence by a diagonal, projection."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import unit_rows
from curvax.checks import is_number, shown
from curvax.filters import difference
from curvax.operators.base import (
    Operator,
    VectorSpace,
    checked_product,
    is_array,
)
from curvax.operators.batches import for_several
from curvax.operators.vectors import check_lengths, read_rows, read_vector, space_like
from curvax.options import takes_options


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


_unit_rows = jax.jit(unit_rows)


def project(vectors: Array, block: Array) -> Array:
    """`block (b, n)` less its components along the orthonormal rows `vectors (k, n)`."""
    inner = jnp.matmul(block, vectors.T, precision="highest")
    return block - jnp.matmul(inner, vectors, precision="highest")


@takes_options()
def identity(like: Any) -> IdentityOperator:
    """Make an identity, to damp an operator with: `A + damping * cx.identity(A)`.

    Args:
        like: an operator, an example vector (an array or a pytree of arrays or
            `ShapeDtypeStruct`s), or an integer n for flat float32 vectors of length n.

    Raises:
        TypeError: none of these, or a leaf that is not real and floating.
        ValueError: no element, an integer below 1, or float64 with JAX's 64-bit mode off.
    """
    return IdentityOperator(space_like(like))


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
    if not (is_number(factor) or is_array(factor)) or jnp.iscomplexobj(factor):
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
    flat = read_vector(op.space, diagonal, "diagonal")
    if not isinstance(flat, jax.core.Tracer) and not bool(jnp.isfinite(flat).all()):
        raise ValueError("diagonal must be finite, got NaN or infinite entries")
    return CongruentOperator(op, flat, op.space)


def project_off(op: Operator, vectors: Any) -> ProjectedOperator:
    """`P A P`; see `Operator.project_off`."""
    block = read_rows(op.space, vectors, "vectors")
    if block.shape[0] >= op.shape[0]:
        raise ValueError(f"vectors must be fewer than n = {op.shape[0]}, got {block.shape[0]}")
    return ProjectedOperator(op, orthonormal_rows(block), op.space)


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
