"""`vmap` over the operands of a map, which all have a batch axis: what is mapped lengthens it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from curvax.jax_internals import Primitive
from curvax.second_order.rules import mapped_size
from curvax.typing import PyTree


def batch_size(x: Array, axis: int | None) -> int:
    """The size of the batch axis, the first but for the one that is mapped."""
    return x.shape[1 if axis == 0 else 0]


def in_longer_batch(
    primitive: Primitive,
    args: Sequence[Array],
    axes: Sequence[int | None],
    whole: Sequence[bool],
    blocks: int,
    sizes: Sequence[int],
    params: PyTree,
) -> tuple[list[Array], list[int]]:
    """A batching rule.

    Args:
        primitive: its arguments have a batch axis of one size or 1, that of the first the size.
        args: its arguments.
        axes: what is mapped.
        whole: of each argument, but for the last `blocks`, whether it needs the whole batch axis.
        blocks: how many of the last arguments have a block axis before the batch axis; if any do,
            so have the results.
        sizes: of the batch axis of each result, or more.
        params: of the primitive.
    """
    size, batch = mapped_size(args, axes), batch_size(args[0], axes[0])
    fixed = len(args) - blocks
    folded = [
        _into_batch(x, axis, size, batch, all_of_it)
        for x, axis, all_of_it in zip(args[:fixed], axes[:fixed], whole, strict=True)
    ]
    for x, axis in zip(args[fixed:], axes[fixed:], strict=True):
        block = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        into = functools.partial(_into_batch, axis=0, size=size, batch=batch, whole=True)
        folded.append(jax.vmap(into, in_axes=1)(block))
    place, parts = min(blocks, 1), []
    for y, own in zip(primitive.bind(*folded, **params), sizes, strict=False):
        part = y.reshape(*y.shape[:place], size, batch, *y.shape[place + 1 :])
        if own < batch:
            part = jnp.sum(part, axis=place + 1, keepdims=True)
        parts.append(part)
    return parts, [place] * len(parts)


def _into_batch(x: Array, axis: int | None, size: int, batch: int, whole: bool) -> Array:
    """`x` with what is mapped as the slower part of its batch axis.

    Where nothing of it is mapped, its batch axis is 1 and it need not be whole, it stays.
    """
    if axis is None and not whole and x.shape[0] == 1:
        return x
    mapped = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
    shape = mapped.shape[2:]
    return jnp.broadcast_to(mapped, (size, batch, *shape)).reshape(size * batch, *shape)
