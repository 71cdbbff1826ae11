"""Choice of the implementation, and blocks of tangents in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from curvax.checks import check_choice
from curvax.ops.attention import reference, tiled
from curvax.ops.attention.options import Masks, Options
from curvax.ops.attention.problem import Slots, Tangents
from curvax.ops.attention.tiles import Grid
from curvax.typing import PyTree

__all__ = ["bend", "check_impl", "curvature", "forward", "pullback", "tangents"]

_MODULES = {"auto": tiled, "reference": reference, "tiled": tiled}


def check_impl(name: str, impl: str) -> str:
    """The name of an implementation; `name` is that of the argument.

    Raises:
        TypeError: not a string.
        ValueError: not a known word.
    """
    return check_choice(name, impl, tuple(_MODULES))


def forward(impl: str, options: Options, masks: Masks, slots: Slots) -> tuple[Array, Array, Array]:
    """See `tiled.forward`."""
    return _module(impl).forward(options, masks, slots)


def tangents(
    impl: str, options: Options, masks: Masks, slots: Slots, kept: Slots, x: Tangents
) -> tuple[Array, Array]:
    """See `tiled.tangents`."""
    own = _module(impl)
    return _in_parts(lambda x: own.tangents(options, masks, slots, kept, x), slots, x)


def pullback(
    impl: str,
    options: Options,
    masks: Masks,
    slots: Slots,
    kept: Slots,
    g: Array,
    wanted: Sequence[bool],
) -> tuple[Array, ...]:
    """See `tiled.pullback`."""
    own = _module(impl)
    return _in_parts(lambda g: own.pullback(options, masks, slots, kept, g, wanted), slots, g)


def curvature(
    impl: str,
    options: Options,
    masks: Masks,
    slots: Slots,
    kept: Slots,
    upstream: Array,
    x: Tangents,
    g: Array | None,
    image: Slots,
    wanted: Sequence[bool],
) -> tuple[Array, ...]:
    """See `tiled.curvature`."""
    here = (options, masks, slots, kept, upstream)
    own = _module(impl)
    return _in_parts(lambda block: own.curvature(*here, *block, wanted), slots, (x, g, image))


def bend(
    impl: str,
    options: Options,
    masks: Masks,
    slots: Slots,
    kept: Slots,
    x: Tangents,
    image: Slots,
    other: Tangents,
) -> Array:
    """See `tiled.bend`."""
    here, own = (options, masks, slots, kept), _module(impl)
    return _in_parts(lambda block: own.bend(*here, *block, other), slots, (x, image))


def _module(impl: str) -> ModuleType:
    return _MODULES[impl]


def _in_parts(function: Callable[[PyTree], PyTree], slots: Slots, block: PyTree) -> PyTree:
    """A function of a block, by parts of it for which tiles are within bounds."""
    query, key = slots[:2]
    size = jax.tree.leaves(block)[0].shape[0]
    most = Grid.block(query.shape[2] // key.shape[2], query.shape[1], key.shape[1])
    if size <= most:
        return function(block)
    count = -(-size // most)
    part = -(-size // count)

    def split(x: Array) -> Array:
        whole = jnp.pad(x, [(0, count * part - size)] + [(0, 0)] * (x.ndim - 1))
        return whole.reshape(count, part, *x.shape[1:])

    out = jax.lax.map(function, jax.tree.map(split, block))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:size], out)
