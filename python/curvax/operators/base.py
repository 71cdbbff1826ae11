"""What every operator is, a symmetric matrix that can be multiplied, and those made of others.

Sums, multiples, congruence by a diagonal, projection and diagonal blocks are methods of all
operators, and operators themselves: hence one file.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator

from curvax.filters import Filter
from curvax.operators.algebra import (
    check_same,
    coefficient,
    diagonal_entries,
    independent_rows,
    project,
)
from curvax.operators.batches import for_several
from curvax.operators.checked_product import check_operator, checked_product, compiled_product
from curvax.operators.partition import By, Part, borders, partition, selected
from curvax.operators.space import VectorSpace
from curvax.options import takes_options
from curvax.typing import Batches, Block, Params, Vector


class Operator(abc.ABC):
    """A symmetric n×n matrix given by its products.

    Vectors have the structure of `params` (of `like`, for `from_matvec`); blocks of vectors have
    one more, leading, axis. `op @ v` takes either. Every operator is a pytree, so that it can be
    an argument of a jitted function: its parameters and data are then arguments too, not
    constants that are compiled in.
    """

    space: VectorSpace

    # NumPy's scalars leave `2 * op` to `__rmul__`.
    __array_ufunc__ = None

    @abc.abstractmethod
    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Multiply flat vectors: `(b, n)` in, `(b, n)` out, of `dtype`. Pure and traceable."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`."""
        return (self.space.n, self.space.n)

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64."""
        return self.space.dtype

    @property
    def rank_bound(self) -> int:
        """What the rank is at most: n, unless the matrix is known to be a sum of fewer."""
        return self.shape[0]

    def __repr__(self) -> str:
        names, n = [name for name in self.space.names if name], self.shape[0]
        shown = ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
        leaves = f", leaves: {shown}" if names else ""
        return f"{type(self).__name__}(shape=({n}, {n}), dtype={self.dtype.name}{leaves})"

    def ravel(self, vector: Vector) -> Float[Array, "*b n"]:
        """Flatten a vector, leaves `leaf`, to `(n,)`, or a block, leaves `(b, *leaf)`, to `(b, n)`.

        Raises:
            TypeError: a leaf is complex.
            ValueError: another structure, or a leaf of another shape.
        """
        return self.space.ravel(vector, batch_axes=int(self.space.is_block(vector)))

    def unravel(self, flat: Float[ArrayLike, "*b n"]) -> Vector:
        """Turn `(n,)`, or `(b, n)`, back into a vector, or a block of b vectors.

        Raises:
            ValueError: another shape.
        """
        shape, n = np.shape(flat), self.shape[0]
        if len(shape) not in (1, 2) or shape[-1] != n:
            raise ValueError(f"flat must have shape ({n},) or (b, {n}), got {shape}")
        return self.space.unravel(jnp.asarray(flat))

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> Operator:
        """The same operator at other parameters, or on other batches; see `Curvature.at`.

        Sums, multiples, `congruence`, `project_off` and `restrict` of such operators go along.

        Raises:
            TypeError: the operator is not one of a loss.
        """
        raise TypeError(
            f"a {type(self).__name__} was not made of parameters and batches, and cannot be moved "
            "to others: make it anew"
        )

    def matvec(self, vector: Vector) -> Vector:
        """Multiply one vector; the result has its structure."""
        check_operator(self)
        return self.unravel(compiled_product(self, self.ravel(vector)))

    def matmat(self, block: Block) -> Block:
        """Multiply a block of vectors, leaves `(b, *leaf)`; the result has its structure."""
        check_operator(self)
        return self.unravel(compiled_product(self, self.space.ravel(block, batch_axes=1)))

    def __matmul__(self, vector: Vector) -> Vector:
        """Multiply a vector or a block, told apart by the number of axes of the first leaf.

        Raises:
            TypeError: `vector` is an operator.
            ValueError: another structure, or leaves of other shapes.
        """
        if isinstance(vector, Operator):
            raise TypeError(
                "the product of two operators is not symmetric, and so none: multiply a vector by "
                "both, A @ (B @ v), or use A.congruence(d) for a diagonal matrix on both sides"
            )
        check_operator(self)
        return self.matmat(vector) if self.space.is_block(vector) else self.matvec(vector)

    def __add__(self, other: object) -> Operator:
        """`A + B`, on the same vectors.

        Raises:
            TypeError: a float32 and a float64 operator.
            ValueError: operators on different vectors.
        """
        return _sum((self, other)) if isinstance(other, Operator) else NotImplemented

    def __radd__(self, other: object) -> Operator:
        """`0 + A`, with which Python's `sum` of operators begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> Operator:
        """`A − B`; see `__add__`."""
        return self + (-other) if isinstance(other, Operator) else NotImplemented

    def __neg__(self) -> Operator:
        """`−A`."""
        return -1.0 * self

    def __mul__(self, factor: ArrayLike) -> Operator:
        """`c A`, with a real number c.

        Raises:
            TypeError: not a real number.
            ValueError: an array, or not finite.
        """
        c = coefficient(factor, self.dtype)
        if isinstance(self, SumOperator):
            return SumOperator(self.terms, tuple(c * own for own in self.coefficients), self.space)
        return SumOperator((self,), (c,), self.space)

    __rmul__ = __mul__

    def __truediv__(self, divisor: ArrayLike) -> Operator:
        """`A / c`, with a real number c other than zero."""
        return self * (1 / divisor)

    @takes_options()
    def congruence(self, diagonal: Vector) -> Operator:
        """`D A D` with a diagonal matrix D, as of a preconditioned Hessian `P^(-1/2) H P^(-1/2)`.

        Args:
            diagonal: the entries of D, a vector (of the structure of `params`, or flat `(n,)`).

        Raises:
            ValueError: another structure or shape, or not finite.
        """
        return CongruentOperator(self, diagonal_entries(self.space, diagonal), self.space)

    @takes_options()
    def project_off(self, vectors: Vector) -> Operator:
        """`P A P`, with P the orthogonal projection off the span of `vectors`.

        Args:
            vectors: a vector, a block of vectors, either of them flat, or an `EigenResult`.

        Raises:
            ValueError: zero, not finite, linearly dependent, or as many as there are parameters.
        """
        return ProjectedOperator(self, independent_rows(self.space, vectors), self.space)

    @takes_options()
    def restrict(self, where: Filter) -> Operator:
        """The diagonal block on the leaves that a filter selects; the others are None in vectors.

        A product costs one of the whole operator: where there is a choice, the argument `where` of
        `hessian` and its like is cheaper.

        Args:
            where: as for `hessian`.

        Raises:
            TypeError: `where` is neither callable nor a pytree of bools.
            ValueError: it selects nothing.
        """
        return RestrictedOperator(self, *selected(self.space, where))

    @takes_options()
    def blocks(self, by: By, *, stacked: str | Sequence[str] = ()) -> Blocks:
        """Diagonal blocks, as of the layers of a network.

        The vectors of a block are dicts, keyed by the leaves' names without what all of them begin
        with; so blocks of equal layers share every compiled program. `eigsh`, `trace` and
        `diagonal` take all blocks at once.

        Args:
            by: which leaves make a block: the number of parts of the names that are to agree (2
                makes `blocks.0` of `blocks.0.attn.qkv`), a function from a leaf's name to that of
                its block or None, or a dict of block names and predicates such as
                `match_names(...)`.
            stacked: names of containers whose leaves hold all layers on their leading axis. Each
                layer is then a leaf of its own: `layers.attn.q` becomes `layers.0.attn.q`, ...

        Returns:
            A `Blocks`: a mapping of names to operators.

        Raises:
            TypeError: `by` is none of these, or returns neither a string nor None.
            ValueError: nothing is selected, `stacked` names no container, or a depth below 1.
        """
        return Blocks(self, partition(self.space, by, stacked))

    def to_scipy(self) -> LinearOperator:
        """The same operator on flat NumPy vectors, for SciPy's solvers."""

        def matmat(columns: np.ndarray) -> np.ndarray:
            block = jnp.asarray(np.ascontiguousarray(columns.T), self.dtype)
            return np.asarray(compiled_product(self, block)).T

        def matvec(v: np.ndarray) -> np.ndarray:
            return matmat(v.reshape(-1, 1))

        return LinearOperator(
            self.shape, matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=self.dtype
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SumOperator(Operator):
    """`Σ cᵢ Aᵢ`. The coefficients are data: another value compiles nothing again."""

    terms: tuple[Operator, ...]
    coefficients: tuple[Array, ...]
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        pairs = zip(self.coefficients, self.terms, strict=True)
        total: Array = sum(c.astype(self.dtype) * checked_product(term, block) for c, term in pairs)  # type: ignore[assignment]
        return total

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> SumOperator:
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

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        d = self.diagonal[None]
        return d * checked_product(self.inner, d * block)

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> CongruentOperator:
        """See `Operator.at`; the diagonal entries stay."""
        return dataclasses.replace(self, inner=self.inner.at(params, batches=batches))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ProjectedOperator(Operator):
    """`P A P`, with the projection `P = I − XᵀX` off orthonormal rows X `(k, n)`."""

    inner: Operator
    vectors: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        return project(self.vectors, checked_product(self.inner, project(self.vectors, block)))

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> ProjectedOperator:
        """See `Operator.at`; the vectors stay."""
        return dataclasses.replace(self, inner=self.inner.at(params, batches=batches))


def _sum(terms: Sequence[Operator]) -> SumOperator:
    """`Σ Aᵢ`; sums and multiples among the terms are taken apart."""
    flat: list[tuple[Array, Operator]] = []
    for term in terms:
        if isinstance(term, SumOperator):
            flat += zip(term.coefficients, term.terms, strict=True)
        else:
            flat.append((jnp.ones((), term.dtype), term))
    first = terms[0].space
    for term in terms[1:]:
        check_same(first, term.space)
    return SumOperator(tuple(op for _, op in flat), tuple(c for c, _ in flat), first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RestrictedOperator(Operator):
    """`E A Eᵀ`, with E the rows of the identity for the chosen elements.

    A product costs one of the whole operator, and memory for two of its vectors.

    Attributes:
        inner: the whole operator.
        starts: `(segments,)` int32, where in the flat vector of `inner` each leaf begins.
    """

    inner: Operator
    starts: Array
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        return self.extract(checked_product(self.inner, self.embed(block)))

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> RestrictedOperator:
        """See `Operator.at`; the parameters are those of the whole."""
        return dataclasses.replace(self, inner=self.inner.at(params, batches=batches))

    def embed(self, block: Array) -> Array:
        """Flat vectors `(b, n)` of this operator as `(b, N)` of the whole one, zero elsewhere."""
        whole = jnp.zeros((block.shape[0], self.inner.shape[0]), block.dtype)
        for i, (first, last) in enumerate(borders(self.space.sizes)):
            piece = lax.slice_in_dim(block, first, last, axis=1)
            whole = lax.dynamic_update_slice_in_dim(whole, piece, self.starts[i], axis=1)
        return whole

    def extract(self, block: Array) -> Array:
        """The transpose: from `(b, N)` to `(b, n)`."""
        pieces = [
            lax.dynamic_slice_in_dim(block, start, size, axis=1)
            for start, size in zip(self.starts, self.space.sizes, strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


Found = TypeVar("Found")


class Blocks(Mapping[str, RestrictedOperator]):
    """The diagonal blocks of an operator, by name.

    Attributes:
        whole: the operator that they are cut out of.
    """

    def __init__(self, whole: Operator, parts: Mapping[str, Part]) -> None:
        self.whole = whole
        self._blocks = {name: RestrictedOperator(whole, *part) for name, part in parts.items()}

    def __getitem__(self, name: str) -> RestrictedOperator:
        """The block of that name."""
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the blocks' first leaves."""
        return iter(self._blocks)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    def alike(self) -> Iterator[tuple[str, RestrictedOperator]]:
        """The items, those of one structure in a row, so that the few programs kept serve them."""
        first: dict[VectorSpace, int] = {}
        for op in self.values():
            first.setdefault(op.space, len(first))
        return iter(sorted(self.items(), key=lambda item: first[item[1].space]))

    def ordered(self, results: Mapping[str, Found]) -> dict[str, Found]:
        """What was found for some blocks, in the order of the blocks."""
        return {name: results[name] for name in self if name in results}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {op.shape[0]}" for name, op in self.items())
        return f"Blocks({sizes})"
