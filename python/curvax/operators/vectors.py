"""Vectors as users give them, and what describes their space."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import to_array
from curvax.checks import is_integer, shown
from curvax.filters import leaf_names
from curvax.operators.placement import check_not_typed_by_shards
from curvax.operators.space import VectorSpace, check_float_dtype, is_array


def read_rows(space: VectorSpace, value: Any, what: str) -> Array:
    """The vectors that an argument means, `(b, n)` in the dtype of the space.

    Args:
        space: where they lie.
        value: a vector, or a block of them, with a leading axis; either of these flat, `(n,)` or
            `(b, n)`; or a result with eigenvectors.
        what: its name, for messages.

    Raises:
        TypeError: a result without eigenvectors, or not made of real numbers.
        ValueError: another structure or shape, no vector, or numbers beyond the range.
    """
    vectors = getattr(value, "eigenvectors", value)
    if vectors is None and value is not None:
        raise TypeError(
            f"{what} is a result without eigenvectors: solve with return_eigenvectors=True"
        )
    n, shape = space.n, np.shape(vectors) if hasattr(vectors, "shape") else None
    if shape is not None and len(shape) in (1, 2) and shape[-1] == n:
        check_not_typed_by_shards(vectors, what)
        rows = jnp.atleast_2d(to_array(vectors, what, space.dtype))
    elif shape is not None and jax.tree.structure(vectors) != space.treedef:
        raise ValueError(
            f"{what}, as a flat array, must have shape ({n},) or (b, {n}), got {shape}"
        )
    else:
        _check_leaves(vectors, what)
        is_block = space.is_block(vectors)
        rows = space.ravel(vectors, int(is_block), what)
        rows = rows if is_block else rows[None]
    if not len(rows):
        raise ValueError(f"{what} must have at least one vector, got a block of none")
    return rows


def read_vector(space: VectorSpace, value: Any, what: str) -> Array:
    """The one vector that an argument means, `(n,)`; see `read_rows`.

    Raises:
        TypeError: see there.
        ValueError: see there, or several vectors.
    """
    rows = read_rows(space, value, what)
    if len(rows) != 1:
        raise ValueError(f"{what} must be one vector, got a block of {len(rows)}")
    return rows[0]


def check_lengths(norms: Array, what: str) -> None:
    """Refuse vectors that have no direction, by the norms of `unit_rows`.

    Raises:
        ValueError: one is zero, or not finite.
    """
    # Nor is NaN, which a row with an infinite entry has in units of its largest.
    if not bool((norms > 0).all()):
        raise ValueError(f"{what} must be finite and not zero")


def _check_leaves(vectors: Any, what: str) -> None:
    """Refuse what is no vector at all, before its structure and shapes are compared."""
    leaves = jax.tree.leaves(vectors)
    if not leaves:
        raise TypeError(
            f"{what} must be a vector, a block of vectors, or a result with eigenvectors, got "
            f"{shown(vectors)}"
        )
    for leaf in leaves:
        if not (hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))):
            raise TypeError(f"{what} must be made of real numbers, got {shown(leaf)}")


def space_like(like: Any) -> VectorSpace:
    """The space of the vectors that look like an example: float64 if any leaf is, else float32.

    Args:
        like: an operator, an integer n for flat float32 vectors, an array, a
            `jax.ShapeDtypeStruct`, or a pytree of these.

    Raises:
        TypeError: none of these, or a leaf that is not real and floating.
        ValueError: no element, an integer below 1, or float64 with JAX's 64-bit mode off.
    """
    own = getattr(like, "space", None)
    if isinstance(own, VectorSpace):
        return own
    if is_integer(like):
        if like < 1:
            raise ValueError(f"like must be an integer n of at least 1, got {like}")
        like = jax.ShapeDtypeStruct((int(like),), jnp.float32)
    leaves = jax.tree.leaves(like)
    pairs = [(like, "")] if like is None else zip(leaves, leaf_names(like), strict=True)
    for leaf, name in pairs:
        if not (is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
            raise TypeError(
                "like must be an operator, an integer n, an array, a "
                "jax.ShapeDtypeStruct(shape, dtype), or a pytree of these, got "
                f"{shown(leaf)}{f' in leaf {name!r}' if name else ''}"
            )
    if sum(math.prod(leaf.shape) for leaf in leaves) == 0:
        raise ValueError(f"like must have at least one element, got {shown(like)}")
    dtypes = [check_float_dtype(leaf.dtype, "like") for leaf in leaves]
    return VectorSpace.of(like, max(dtypes, key=lambda dtype: dtype.itemsize))
