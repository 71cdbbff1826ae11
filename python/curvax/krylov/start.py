"""The starting block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import to_array
from curvax.checks import shown
from curvax.krylov.settings import Settings
from curvax.operators.base import Operator
from curvax.results import EigenResult

# The length of the random vector that is mixed into a unit vector of the user's. Alone, that might
# lie in an invariant subspace, as where a loss is a sum over disjoint parameters, and stay there.
MIXED = 0.1


@dataclasses.dataclass(frozen=True)
class Start:
    """What the random part of a start has to show of an eigenvalue before that is excluded.

    Attributes:
        weight: the length of the random part.
        odds: eigenvalues with a component as small as one start in `1/(0.8 odds)` has are waited
            for.
        overtaking: those that exceed a wanted one by this much of |λ|max, or by three tolerances.
    """

    weight: float
    odds: float
    overtaking: float


# Waiting longer costs products: 4 % on a cold start, 20 % on one of the user's, whose components of
# what has overtaken are a tenth as large.
COLD = Start(1.0, 0.03, 0.0)
WARM = Start(MIXED, 0.3, 3e-2)


def starting_block(op: Operator, v0: Any, settings: Settings) -> Array | None:
    """The block `(b, n)` that `v0` means, or None for a random one.

    More vectors than a block holds are added up: the Krylov space of a sum of approximate
    eigenvectors contains them all again after as many products. To each row a tenth of a random
    vector is added.

    Raises:
        TypeError: `v0` has no vectors, or is not made of real numbers.
        ValueError: `v0` does not look like a vector or a block of the operator, or is zero or not
            finite.
    """
    if v0 is None:
        return None
    vectors = unit_vectors(op, v0)
    given, b = vectors.shape[0], settings.block
    if given > b:
        pad = jnp.zeros((-given % b, vectors.shape[1]), vectors.dtype)
        # About as long as the sum of unit vectors that are orthogonal.
        count = -(-given // b)
        vectors = jnp.concatenate([vectors, pad]).reshape(-1, b, vectors.shape[1]).sum(axis=0)
        vectors = vectors / count**0.5
    key = jax.random.key(settings.seed & 0xFFFFFFFF, impl="threefry2x32")
    noise = jax.random.normal(jax.random.fold_in(key, 0), (b, vectors.shape[1]), vectors.dtype)
    noise = noise / vectors.shape[1] ** 0.5
    return jnp.concatenate([vectors + MIXED * noise[: len(vectors)], noise[len(vectors) :]])


def unit_vectors(op: Operator, v0: Any) -> Array:
    """The vectors that `v0` means, `(count, n)`, divided by their norms; see `starting_block`."""
    vectors = _vectors(op, v0)
    if not len(vectors):
        raise ValueError("v0 must have at least one vector, got a block of none")
    # Scaled first: the squares of small or large entries leave the range of float32.
    vectors = vectors / jnp.max(jnp.abs(vectors), axis=1, keepdims=True)
    norms = jnp.linalg.norm(vectors, axis=1)
    if not bool(jnp.isfinite(norms).all()) or not bool((norms > 0).all()):
        raise ValueError("v0 must be finite and not zero")
    return vectors / norms[:, None]


def _vectors(op: Operator, v0: Any) -> Array:
    if isinstance(v0, EigenResult):
        if v0.eigenvectors is None:
            raise TypeError("v0 is a result without eigenvectors (return_eigenvectors=False)")
        v0 = v0.eigenvectors
    leaves = jax.tree.leaves(v0)
    if not leaves:
        raise TypeError(f"v0 must be a vector, a block or an EigenResult, got {shown(v0)}")
    for leaf in leaves:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise TypeError(f"v0 must be made of real numbers, got dtype {dtype}")
    if hasattr(v0, "shape") and jax.tree.structure(v0) != op.space.treedef:
        n = op.shape[0]
        if v0.ndim not in (1, 2) or v0.shape[-1] != n:
            raise ValueError(
                f"v0, as a flat array, must have shape ({n},) or (b, {n}), got {tuple(v0.shape)}"
            )
        return jnp.atleast_2d(to_array(v0, "v0", op.dtype))
    is_block = op.space.is_block(v0)
    vectors = op.space.ravel(v0, int(is_block), what="v0")
    return vectors if is_block else vectors[None]
