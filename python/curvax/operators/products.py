"""Products with the matrices of equal microbatches: values that know how to multiply.

Each holds what it multiplies by: the residuals of a linearisation, the vectors of outer products,
or nothing but a traced function. All give the loss of a microbatch too, and with it, at other
parameters, what they are to hold there.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.columns import CHUNK, over_columns
from curvax.operators.closure import Closed
from curvax.operators.flat_product import flat_product
from curvax.operators.space import VectorSpace
from curvax.typing import Batch, Batches, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Product(abc.ABC):
    """How to multiply by the matrices of a stack of equal microbatches.

    Attributes:
        primal: `(leaves, batch) -> (mean, weight, residuals)` of one microbatch.
        residuals: of all microbatches, stacked; those of a single one have no such axis, which XLA
            would copy them to take off. Empty before they are computed.
    """

    primal: Closed
    residuals: tuple[Array, ...]

    @abc.abstractmethod
    def multiply(
        self,
        space: VectorSpace,
        leaves: Sequence[Array],
        batches: Batches,
        shares: Array | None,
        block: Array,
    ) -> Array:
        """The sum over the microbatches of their shares times their products.

        Args:
            space: that of the vectors.
            leaves: of the parameters.
            batches: the microbatches, stacked.
            shares: `(microbatches,)`; None of the only microbatch that there is.
            block: `(b, n)` flat vectors.
        """

    def evaluate(self, leaves: Sequence[Array], batch: Batch) -> tuple[Array, Array, PyTree]:
        """The mean loss of one microbatch, its weight, and its residuals."""
        mean, weight, residuals = self.primal(leaves, batch)
        return mean, weight, residuals

    @property
    def bytes_of_one(self) -> int:
        """Bytes of the residuals of one microbatch, by their types."""
        return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in self.kept_types())

    def kept_types(self) -> list[Any]:
        """The types of the residuals of one microbatch."""
        return [out.aval for out in self.primal.traced.jaxpr.outvars[2:]]

    def holding(self, residuals: Sequence[Array]) -> Self:
        """The same with other residuals."""
        return dataclasses.replace(self, residuals=tuple(residuals))


# A program from leaves of a vector to leaves, with its arguments before and after these.
Call: TypeAlias = tuple[Closed, list[Array], list[Array]]


class OneByOne(Product):
    """One microbatch after the other."""

    @abc.abstractmethod
    def program(self, leaves: Sequence[Array], batch: Batch) -> Call:
        """What multiplies by the matrix of one microbatch, whose own residuals are held."""

    def multiply(
        self,
        space: VectorSpace,
        leaves: Sequence[Array],
        batches: Batches,
        shares: Array | None,
        block: Array,
    ) -> Array:
        """See `Product`."""

        def one(entry: PyTree) -> Array:
            batch, residuals, share = entry
            program, before, after = self.holding(residuals).program(leaves, batch)

            def column(flat: Array) -> Array:
                return flat_product(program, before, flat, after, space)

            rows = column(block[0])[None] if block.shape[0] == 1 else jax.vmap(column)(block)
            if share is None:
                return rows
            # A microbatch without any label has weight 0, and often the mean 0/0.
            return jnp.where(share > 0, share * rows, 0)

        if shares is None or shares.shape[0] == 1:
            batch, share = jax.tree.map(lambda leaf: leaf[0], (batches, shares))
            return one((batch, self.residuals, share))

        def add(total: Array, entry: PyTree) -> tuple[Array, None]:
            return total + one(entry), None

        entries = (batches, self.residuals, shares)
        total: Array = jax.lax.scan(add, jnp.zeros_like(block), entries)[0]
        return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Linearised(OneByOne):
    """By the linear half of a linearisation, whose residuals were computed once.

    Residuals that are inputs of the primal half (weights, data) are not held a second time.

    Attributes:
        linear: `(operands, tangents) -> products`.
        kept: which of all that the primal half returns are the residuals to be held.
        places: of each operand, its place among the constants, leaves and arrays of the batch, and
            after these the residuals.
    """

    linear: Closed
    kept: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def evaluate(self, leaves: Sequence[Array], batch: Batch) -> tuple[Array, Array, PyTree]:
        """See `Product`."""
        mean, weight, operands = self.primal(leaves, batch)
        return mean, weight, tuple(operands[i] for i in self.kept)

    def kept_types(self) -> list[Any]:
        """See `Product`."""
        types = super().kept_types()
        return [types[i] for i in self.kept]

    def program(self, leaves: Sequence[Array], batch: Batch) -> Call:
        """See `OneByOne`."""
        known = [*self.primal.consts, *jax.tree.leaves((leaves, batch)), *self.residuals]
        return self.linear, [known[place] for place in self.places], []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Recomputed(OneByOne):
    """By a function that computes all it needs anew.

    Attributes:
        whole: `(leaves, batch, tangents) -> products`.
    """

    whole: Closed

    def program(self, leaves: Sequence[Array], batch: Batch) -> Call:
        """See `OneByOne`."""
        return self.whole, jax.tree.leaves((leaves, batch)), []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OuterProducts(Product):
    """By matrices `Σ x xᵀ`, whose residuals are the x: vectors, as leaves, on a leading axis."""

    def multiply(
        self,
        space: VectorSpace,
        leaves: Sequence[Array],
        batches: Batches,
        shares: Array | None,
        block: Array,
    ) -> Array:
        """See `Product`: all microbatches at once, as products of matrices."""
        sized = zip(self.residuals, space.sizes, strict=True)
        rows = [x.reshape(-1, size).astype(block.dtype) for x, size in sized]
        pieces = jnp.split(block, np.cumsum(space.sizes)[:-1], axis=1)
        inner: PyTree = sum(_inner(x, piece) for x, piece in zip(rows, pieces, strict=True))
        if shares is not None:
            inner = inner * jnp.repeat(shares, inner.shape[1] // shares.shape[0])[None]
        out = [jnp.einsum("bn,ni->bi", inner, x, precision="highest") for x in rows]
        return jnp.concatenate(out, axis=1)


def _inner(rows: Array, block: Array) -> Array:
    """`block (b, n)` times the transpose of `rows (N, n)`; no sum of float32 is long."""

    def add(total: Array, first: Array, width: int) -> Array:
        x, v = (jax.lax.dynamic_slice_in_dim(a, first, width, axis=1) for a in (rows, block))
        return total + _inner_by_panels(x, v)

    n = rows.shape[1]
    if n <= 4 * CHUNK:
        return jnp.einsum("bi,ni->bn", block, rows, precision="highest")
    shape = (block.shape[0], rows.shape[0])
    result: Array = over_columns(add, jnp.zeros(shape, block.dtype), n, rows=sum(shape))
    return result


def _inner_by_panels(rows: Array, block: Array) -> Array:
    """As `_inner`, of a step's columns: each sum is over at most twice a `CHUNK` of them."""
    panels = block.shape[1] // CHUNK
    if panels <= 1:
        return jnp.einsum("bi,ni->bn", block, rows, precision="highest")
    v, x = (a[:, : panels * CHUNK].reshape(-1, panels, CHUNK) for a in (block, rows))
    inner = jnp.sum(jnp.einsum("bpi,npi->pbn", v, x, precision="highest"), axis=0)
    v, x = (a[:, panels * CHUNK :] for a in (block, rows))
    return inner + jnp.einsum("bi,ni->bn", v, x, precision="highest")
