"""The starting block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.krylov.settings import Settings
from curvax.operators.base import Operator
from curvax.results import EigenResult


def starting_block(op: Operator, v0: Any, settings: Settings) -> Array | None:
    """The block `(b, n)` that `v0` means, or None for a random one.

    More vectors than a block holds are added up: the Krylov space of a sum of approximate
    eigenvectors contains them all again after as many products.

    Raises:
        TypeError: `v0` has no vectors, or is complex.
        ValueError: `v0` does not look like a vector or a block of the operator, or is zero or not
            finite.
    """
    if v0 is None:
        return None
    vectors = _vectors(op, v0)
    norms = jnp.linalg.norm(vectors, axis=1)
    if not bool(jnp.isfinite(norms).all()) or not bool((norms > 0).all()):
        raise ValueError("v0 must be finite and not zero")
    vectors = vectors / norms[:, None]
    given, b = vectors.shape[0], settings.block
    if given > b:
        pad = jnp.zeros((-given % b, vectors.shape[1]), vectors.dtype)
        return jnp.concatenate([vectors, pad]).reshape(-1, b, vectors.shape[1]).sum(axis=0)
    if given < b:
        key = jax.random.fold_in(jax.random.key(settings.seed & 0xFFFFFFFF), 0)
        rest = jax.random.normal(key, (b - given, vectors.shape[1]), vectors.dtype)
        return jnp.concatenate([vectors, rest])
    return vectors


def _vectors(op: Operator, v0: Any) -> Array:
    if isinstance(v0, EigenResult):
        if v0.eigenvectors is None:
            raise TypeError("v0 is a result without eigenvectors (return_eigenvectors=False)")
        return op.space.ravel(v0.eigenvectors, batch_axes=1)
    leaves = jax.tree.leaves(v0)
    if not leaves:
        raise TypeError(f"v0 must be a vector, a block or an EigenResult, got {v0!r}")
    flat_block = hasattr(v0, "ndim") and v0.ndim in (1, 2) and v0.shape[-1] == op.shape[0]
    if flat_block and len(op.space.shapes) > 1:
        return jnp.atleast_2d(jnp.asarray(v0, op.dtype))
    is_block = np.ndim(leaves[0]) == len(op.space.shapes[0]) + 1
    return op.space.ravel(v0, 1) if is_block else op.space.ravel(v0)[None]
