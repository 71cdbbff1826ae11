"""Under `shard_map`, every array is typed by the mesh axes it varies over; elsewhere by none.

JAX's own operations bring their operands to one type. Primitives and foreign calls must do so
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from curvax.typing import DTypeLike


def varying(*arrays: Array) -> frozenset[str]:
    """The mesh axes that any of the arrays varies over."""
    avals: list[jax.core.ShapedArray] = [jax.typeof(x) for x in arrays]
    return frozenset[str]().union(*(aval.mat.varying for aval in avals))


def sharded_axes(*arrays: Array) -> frozenset[str]:
    """The axes of a `shard_map` around this over which any of the arrays may be cut into shards.

    All of them where JAX does not keep account (`check_vma=False`).
    """
    around = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    accounted = all(varying(jax.lax.axis_index(axis)) for axis in around)
    return varying(*arrays) if accounted else around


def vary(x: Array, axes: frozenset[str]) -> Array:
    """`x`, typed as varying over `axes` too."""
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def equally_varying(*groups: Sequence[Array]) -> tuple[tuple[Array, ...], ...]:
    """The arrays, each typed as varying over every axis that one of them varies over."""
    axes = varying(*(x for group in groups for x in group))
    return tuple(tuple(vary(x, axes) for x in group) for group in groups)


def zeros_beside(like: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Zeros of the type that results of computing with `like` have."""
    return vary(jnp.zeros(shape, dtype), varying(like))
