"""The starting block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from curvax.arrays import unit_rows
from curvax.checks import seed_word
from curvax.krylov.request import Request
from curvax.operators.base import Operator
from curvax.operators.vectors import check_lengths, read_rows

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


def starting_block(op: Operator, request: Request, b: int) -> Array | None:
    """The block `(b, n)` that the request's `v0` means, or None for a random one.

    More vectors than a block holds are added up: the Krylov space of a sum of approximate
    eigenvectors contains them all again after as many products. To each row a tenth of a random
    vector is added.

    Raises:
        TypeError: `v0` has no vectors, or is not made of real numbers.
        ValueError: `v0` does not look like a vector or a block of the operator, or is zero or not
            finite.
    """
    if request.v0 is None:
        return None
    vectors = unit_vectors(op, request.v0)
    given = vectors.shape[0]
    if given > b:
        pad = jnp.zeros((-given % b, vectors.shape[1]), vectors.dtype)
        # About as long as the sum of unit vectors that are orthogonal.
        count = -(-given // b)
        vectors = jnp.concatenate([vectors, pad]).reshape(-1, b, vectors.shape[1]).sum(axis=0)
        vectors = vectors / count**0.5
    key = jax.random.key(seed_word(request.seed), impl="threefry2x32")
    noise = jax.random.normal(jax.random.fold_in(key, 0), (b, vectors.shape[1]), vectors.dtype)
    noise = noise / vectors.shape[1] ** 0.5
    return jnp.concatenate([vectors + MIXED * noise[: len(vectors)], noise[len(vectors) :]])


def unit_vectors(op: Operator, v0: Any) -> Array:
    """The vectors that `v0` means, `(count, n)`, divided by their norms; see `starting_block`."""
    rows, norms = unit_rows(read_rows(op.space, v0, "v0"))
    check_lengths(norms, "v0")
    return rows
