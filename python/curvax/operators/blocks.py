"""Diagonal blocks of an operator: on some leaves of its vectors, or on slices of stacked leaves.

A block is cut out of the flat vector by segments, whose places are data and whose lengths are
static. Its vectors are dicts keyed by what distinguishes the leaves within the block. So blocks of
equal shapes, such as the layers of a network, share every compiled program.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from curvax.checks import cut, is_integer, shown
from curvax.filters import Filter, matching, select
from curvax.operators.base import Operator, VectorSpace, checked_product


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

    def product(self, block: Array) -> Array:
        """See `Operator.product`."""
        return self.extract(checked_product(self.inner, self.embed(block)))

    def at(self, params: Any, *, batches: Any = None) -> "RestrictedOperator":
        """See `Operator.at`; the parameters are those of the whole."""
        return dataclasses.replace(self, inner=self.inner.at(params, batches=batches))

    def embed(self, block: Array) -> Array:
        """Flat vectors `(b, n)` of this operator as `(b, N)` of the whole one, zero elsewhere."""
        whole = jnp.zeros((block.shape[0], self.inner.shape[0]), block.dtype)
        for i, (first, last) in enumerate(_borders(self.space.sizes)):
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


def _borders(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(itertools.accumulate(sizes, initial=0))


def restrict(op: Operator, where: Filter) -> RestrictedOperator:
    """The diagonal block on the leaves that a filter selects; see `Operator.restrict`."""
    space, leaves = op.space, _leaves(op.space)
    chosen = select(jax.tree.unflatten(space.treedef, leaves), where)
    kept = [leaf if taken else None for leaf, taken in zip(leaves, chosen, strict=True)]
    firsts = [first for first, _ in _borders(space.sizes)]
    starts = [first for first, taken in zip(firsts, chosen, strict=True) if taken]
    own = VectorSpace.of(jax.tree.unflatten(space.treedef, kept), space.dtype)
    return RestrictedOperator(op, _places(op, starts), own)


def _leaves(space: VectorSpace) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, space.dtype) for shape in space.shapes]


def _places(op: Operator, starts: Sequence[int]) -> Array:
    if op.shape[0] >= 2**31:
        raise ValueError(
            f"an operator of at most 2**31 - 1 parameters can be restricted, got {op.shape[0]}: "
            "give the filter to the operator itself, as where="
        )
    return jnp.asarray(starts, jnp.int32)


class Piece(NamedTuple):
    """A leaf, or a slice of a stacked leaf: its name, its place in the flat vector, its shape."""

    name: str
    start: int
    shape: tuple[int, ...]


By = int | Callable[[str], str | None] | Mapping[str, Callable[[str, object], bool]]


class Blocks(Mapping[str, RestrictedOperator]):
    """The diagonal blocks of an operator, by name.

    Attributes:
        whole: the operator that they are cut out of.
    """

    def __init__(self, whole: Operator, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self.whole = whole
        self._blocks = {name: _block(whole, group) for name, group in pieces.items()}

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

    def ordered(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """What was found for some blocks, in the order of the blocks."""
        return {name: results[name] for name in self if name in results}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {op.shape[0]}" for name, op in self.items())
        return f"Blocks({sizes})"


def blocks(op: Operator, by: By, stacked: str | Sequence[str]) -> Blocks:
    """See `Operator.blocks`."""
    containers = (stacked,) if isinstance(stacked, str) else tuple(stacked)
    pieces = _pieces(op.space, containers)
    if isinstance(by, Mapping):
        groups = _by_filters(pieces, by)
    elif callable(by) or is_integer(by):
        by = by if callable(by) else int(by)
        groups = _by_names(pieces, by)
    else:
        raise TypeError(
            "by must be a depth, a function (name) -> group or None, or a dict of filters, got "
            f"{shown(by)}"
        )
    for name, group in list(groups.items()):
        if any(math.prod(piece.shape) for piece in group):
            continue
        if isinstance(by, int):
            del groups[name]
        else:
            raise ValueError(f"by makes a block {name!r} without a parameter: return None for it")
    return Blocks(op, groups)


def _pieces(space: VectorSpace, containers: Sequence[str]) -> list[Piece]:
    for container in containers:
        if not any(name.startswith(f"{container}.") for name in space.names):
            raise ValueError(
                f"stacked names {container!r}, but no leaf is in it; the names are "
                f"{cut(', '.join(space.names))}"
            )
    pieces = []
    for name, shape, (start, _) in zip(
        space.names, space.shapes, _borders(space.sizes), strict=True
    ):
        inside = next((c for c in containers if name.startswith(f"{c}.")), None)
        if inside is None:
            pieces.append(Piece(name, start, shape))
            continue
        if not shape:
            raise ValueError(f"stacked leaves need an axis of layers, but {name!r} is a scalar")
        size, rest = math.prod(shape[1:]), name[len(inside) :]
        pieces += [
            Piece(f"{inside}.{i}{rest}", start + i * size, shape[1:]) for i in range(shape[0])
        ]
    return pieces


def _by_names(
    pieces: Sequence[Piece], by: int | Callable[[str], str | None]
) -> dict[str, list[Piece]]:
    if isinstance(by, int) and by < 1:
        raise ValueError(f"by, a depth, must be at least 1, got {by}")
    groups: dict[str, list[Piece]] = {}
    group: str | None
    for piece in pieces:
        group = ".".join(piece.name.split(".")[:by]) if isinstance(by, int) else by(piece.name)
        if group is not None and not isinstance(group, str):
            raise TypeError(
                f"by must return a string or None, got {shown(group)} for {piece.name!r}"
            )
        if group is not None:
            groups.setdefault(group, []).append(piece)
    if not groups:
        names = cut(", ".join(piece.name for piece in pieces))
        raise ValueError(f"by returns None for every leaf: the names are {names}")
    return groups


def _by_filters(
    pieces: Sequence[Piece], by: Mapping[str, Callable[[str, object], bool]]
) -> dict[str, list[Piece]]:
    if not by:
        raise ValueError("by, a dict of filters, must have at least one, got {}")
    names = [piece.name for piece in pieces]
    shapes = [jax.ShapeDtypeStruct(piece.shape, jnp.float32) for piece in pieces]
    groups = {}
    for group, where in by.items():
        if not callable(where):
            raise TypeError(
                f"by[{group!r}] must be a predicate (name, leaf) -> bool such as match_names(...), "
                f"got {shown(where)}"
            )
        chosen = matching(names, shapes, where, f"by[{group!r}]")
        groups[group] = [piece for piece, taken in zip(pieces, chosen, strict=True) if taken]
    return groups


def _block(op: Operator, pieces: Sequence[Piece]) -> RestrictedOperator:
    """The vectors are dicts keyed by the leaves' names without what all of them begin with."""
    parts = [piece.name.split(".") for piece in pieces]
    common = 0
    while len({tuple(p[: common + 1]) for p in parts}) == 1 and common < len(parts[0]) - 1:
        common += 1
    own = [".".join(p[common:]) for p in parts]
    # In the order in which JAX flattens a dict.
    order = sorted(range(len(pieces)), key=lambda i: own[i])
    like = {own[i]: jax.ShapeDtypeStruct(pieces[i].shape, op.dtype) for i in order}
    starts = _places(op, [pieces[i].start for i in order])
    return RestrictedOperator(op, starts, VectorSpace.of(like, op.dtype))
