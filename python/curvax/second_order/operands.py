"""The operands, parameters and types of the primitives of a map."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypedDict, Unpack

import jax
from jax import Array
from jax.core import ShapedArray
from jax.sharding import PartitionSpec

from curvax.jax_internals import ad
from curvax.ops.dtypes import compute_dtype
from curvax.second_order import rules
from curvax.second_order.rules import Flags, T
from curvax.typing import PyTree

# What `value` returns: the output and two statistics of its rows.
KEPT = 3


class Params(TypedDict):
    """Of an equation with a product: whether it has an upstream gradient, and an image."""

    spec: Hashable
    slots: int
    data: int
    upstream: bool
    image: bool
    given: Flags
    wanted: Flags


class BendParams(TypedDict):
    """Of an equation with a second derivative of the map; the flags are of its two tangents."""

    spec: Hashable
    slots: int
    data: int
    flags: tuple[Flags, Flags]


@dataclasses.dataclass(frozen=True)
class Operands(Generic[T]):
    """Of a product, or their tangents, or their batch axes."""

    slots: Sequence[T]
    data: Sequence[T]
    kept: Sequence[T]
    upstream: Sequence[T]
    tangents: Sequence[T]
    image: Sequence[T]

    @classmethod
    def of(cls, args: Sequence[T], params: Params) -> Operands[T]:
        """Of the operands of an equation in their order."""
        left = list(args)
        counts = (params["slots"], params["data"], KEPT, params["upstream"], sum(params["given"]))
        parts = []
        for count in counts:
            parts.append(left[:count])
            del left[:count]
        slots, data, kept, upstream, tangents = parts
        return cls(slots, data, kept, upstream, tangents, left)

    @property
    def fixed(self) -> list[T]:
        """All but tangents and their image."""
        return [*self.slots, *self.data, *self.kept, *self.upstream]


@dataclasses.dataclass(frozen=True)
class BendOperands(Generic[T]):
    """Of a second derivative: a block of tangents with its image, and another tangent."""

    at: Operands[T]
    block: Sequence[T | None]
    image: Sequence[T]
    other: Sequence[T | None]

    @classmethod
    def of(cls, args: Sequence[T], params: BendParams) -> BendOperands[T]:
        """Of the operands of an equation in their order."""
        first, second = params["flags"]
        border = len(args) - sum(first) - sum(second) - 2
        count = params["slots"]
        data, kept = args[count : border - KEPT], args[border - KEPT : border]
        at = Operands(args[:count], data, kept, [], [], [])
        rest = args[border:]
        own, image, last = (rest[: sum(first)], rest[sum(first) :][:2], rest[sum(first) + 2 :])
        return cls(at, rules.filled(own, first), image, rules.filled(last, second))


def value_types(*avals: ShapedArray, spec: Hashable, slots: int) -> list[ShapedArray]:
    """The types of the output, of the first slot, and of the statistics of its rows."""
    out = avals[0].update(weak_type=False)
    layout = out.sharding.update(spec=PartitionSpec(*out.sharding.spec[:-1]))
    row = out.update(shape=out.shape[:-1], dtype=compute_dtype(out.dtype), sharding=layout)
    return [out, row, row]


def product_types(*avals: ShapedArray, **params: Unpack[Params]) -> list[ShapedArray]:
    """The types of what is wanted: of slots, and of the output with its statistic."""
    at, wanted = Operands.of(avals, params), params["wanted"]
    results = [slot for slot, flag in zip(at.slots, wanted, strict=False) if flag]
    results += [at.kept[0], at.kept[2]] if wanted[-1] else []
    return [rules.block_type(at.tangents[0].shape[0], aval) for aval in results]


def bend_type(*avals: ShapedArray, **params: Unpack[BendParams]) -> list[ShapedArray]:
    """The type of a block of tangents of the output."""
    own = BendOperands.of(avals, params)
    (first, *_), _ = rules.there(own.block)
    return [rules.block_type(first.shape[0], own.at.kept[0])]


def zero(y: Array) -> PyTree:
    """The tangent of an array that is zero by its type."""
    return ad.Zero(jax.typeof(y).to_tangent_aval())


def one_tangent_block(x: Sequence[Array | None]) -> list[Array | None]:
    """Blocks of one tangent each."""
    return [None if t is None else t[None] for t in x]


def over_block(one: Callable[..., list[Array]], *blocks: Array | None) -> list[Array]:
    """`one` of each entry of blocks, or of None."""
    if next(x for x in blocks if x is not None).shape[0] > 1:
        return jax.vmap(one)(*blocks)
    return [y[None] for y in one(*(None if x is None else x[0] for x in blocks))]
