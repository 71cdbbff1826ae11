"""Rows of a matrix, as the kernel and the reference are given them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

# The numbers of two vectors for each product; as an array `(pairs, 2)`.
Pairs = Sequence[tuple[int, int]] | np.ndarray


class Rows(NamedTuple):
    """Some consecutive rows of a matrix, as they are stored.

    Attributes:
        stored: `(rows, columns)`, float32, float64, bfloat16 or float16.
        start: int32 scalar, the first of them.
        number: how many.
        scale: a power of two, by which they are larger than the vectors that they stand for.
    """

    stored: Array
    start: Array
    number: int
    scale: float = 1.0

    @classmethod
    def all_of(cls, block: Array) -> Rows:
        """The rows of a block of vectors."""
        return cls(block, jnp.zeros((), jnp.int32), len(block))
