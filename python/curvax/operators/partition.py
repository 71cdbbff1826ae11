"""Parts of the vectors of an operator: some leaves, or slices of stacked leaves.

A part is cut out of the flat vector by segments, whose places are data and whose lengths are
static. Its vectors are dicts keyed by what distinguishes the leaves within it. So parts of equal
shapes, such as the layers of a network, share every compiled program.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from curvax.checks import cut, is_integer, shown
from curvax.filters import Filter, matching, select
from curvax.operators.space import VectorSpace

# Where in the flat vector each leaf of a part begins, `(segments,)` int32, and its vectors.
Part = tuple[Array, VectorSpace]


def borders(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and the last place of each segment of a flat vector."""
    return itertools.pairwise(itertools.accumulate(sizes, initial=0))


def selected(space: VectorSpace, where: Filter) -> Part:
    """The leaves that a filter selects; see `Operator.restrict`."""
    leaves = [jax.ShapeDtypeStruct(shape, space.dtype) for shape in space.shapes]
    chosen = select(jax.tree.unflatten(space.treedef, leaves), where)
    kept = [leaf if taken else None for leaf, taken in zip(leaves, chosen, strict=True)]
    firsts = [first for first, _ in borders(space.sizes)]
    starts = [first for first, taken in zip(firsts, chosen, strict=True) if taken]
    own = VectorSpace.of(jax.tree.unflatten(space.treedef, kept), space.dtype)
    return _places(space, starts), own


def _places(space: VectorSpace, starts: Sequence[int]) -> Array:
    if space.n >= 2**31:
        raise ValueError(
            f"an operator of at most 2**31 - 1 parameters can be restricted, got {space.n}: "
            "give the filter to the operator itself, as where="
        )
    return jnp.asarray(starts, jnp.int32)


class Piece(NamedTuple):
    """A leaf, or a slice of a stacked leaf: its name, its place in the flat vector, its shape."""

    name: str
    start: int
    shape: tuple[int, ...]


By = int | Callable[[str], str | None] | Mapping[str, Callable[[str, object], bool]]


def partition(space: VectorSpace, by: By, stacked: str | Sequence[str]) -> dict[str, Part]:
    """The parts, by name; see `Operator.blocks`."""
    containers = (stacked,) if isinstance(stacked, str) else tuple(stacked)
    pieces = _pieces(space, containers)
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
    return {name: _part(space, group) for name, group in groups.items()}


def _pieces(space: VectorSpace, containers: Sequence[str]) -> list[Piece]:
    for container in containers:
        if not any(name.startswith(f"{container}.") for name in space.names):
            raise ValueError(
                f"stacked names {container!r}, but no leaf is in it; the names are "
                f"{cut(', '.join(space.names))}"
            )
    pieces = []
    for name, shape, (start, _) in zip(
        space.names, space.shapes, borders(space.sizes), strict=True
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


def _part(space: VectorSpace, pieces: Sequence[Piece]) -> Part:
    """The vectors are dicts keyed by the leaves' names without what all of them begin with."""
    parts = [piece.name.split(".") for piece in pieces]
    common = 0
    while len({tuple(p[: common + 1]) for p in parts}) == 1 and common < len(parts[0]) - 1:
        common += 1
    own = [".".join(p[common:]) for p in parts]
    # In the order in which JAX flattens a dict.
    order = sorted(range(len(pieces)), key=lambda i: own[i])
    like = {own[i]: jax.ShapeDtypeStruct(pieces[i].shape, space.dtype) for i in order}
    starts = _places(space, [pieces[i].start for i in order])
    return starts, VectorSpace.of(like, space.dtype)
