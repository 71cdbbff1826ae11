"""How the basis is stored: in the dtype of the operator, or in 16 bits.

A stored row is the vector times `scale`, rounded; the product is applied to what was stored. Rows
are padded so that each begins at a multiple of 128 bytes, whatever n is: a GPU reads such rows four
to eight times as wide. What is in the padding matters to nobody.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from curvax.ops.block_ortho import padded_length
from curvax.ops.inner_products import Rows
from curvax.typing import DTypeLike

# The largest power of two that an entry of a unit vector can be multiplied by in float16.
_LARGEST_SCALE = 2.0**15


@jax.tree_util.register_static
class Length(int):
    """The n of padded rows, as an argument of a compiled program that is known where it is traced.

    None in its place stands for rows without padding.
    """


def shape(rows: int, n: int, dtype: DTypeLike) -> tuple[int, int]:
    """The shape of a basis of that many rows."""
    return rows, padded_length(n, dtype)


def length(basis: Array, n: Length | None) -> int:
    """The n of the rows of a basis."""
    return basis.shape[1] if n is None else int(n)


def scale(dtype: DTypeLike, n: int) -> float:
    """The factor by which stored rows of length n are larger than the vectors.

    For float16 the power of two next to √n: entries of a unit vector are about 1/√n, which from
    n = 10⁷ on is so near the smallest normal number that they would lose digits. A power of two
    rounds nothing. bfloat16 has the exponents of float32 and needs none.
    """
    if np.dtype(dtype) != np.float16:
        return 1.0
    return min(2.0 ** round(math.log2(n) / 2), _LARGEST_SCALE)


def vectors(stored: Array, n: int) -> Array:
    """The vectors that rows of length n, or pieces of such rows, stand for; at least float32."""
    if stored.dtype in (jnp.float32, jnp.float64):
        return stored
    return stored.astype(jnp.float32) / scale(stored.dtype, n)


def rows(basis: Array, start: Array, count: int, n: int) -> Array:
    """The `count` vectors of length n that the rows of the basis from `start` stand for."""
    stored = lax.dynamic_slice(basis, (start, jnp.zeros_like(start)), (count, n))
    return vectors(stored, n)


def stored(basis: Array, start: Array, count: int, n: int) -> Rows:
    """The same rows as they are stored, for inner products."""
    return Rows(basis, start, count, scale(basis.dtype, n))


def roundoff(dtype: DTypeLike) -> float:
    """The norm of the error that rounding to `dtype` adds to a unit vector.

    Of normally distributed entries, root mean square: 2.1e-4 in float16, 1.7e-3 in bfloat16.
    """
    return 0.212 * float(jnp.finfo(dtype).eps)


def noise(dtype: DTypeLike) -> float:
    """What storage adds to a residual, relative to |λ|max, in squares; 0 where nothing is narrowed.

    Two roundings show in it: of the rows that span a Ritz vector, and of that vector itself. A
    Rayleigh quotient, stationary at an eigenvector, changes by the square: 9e-8 in float16.
    """
    return 0.0 if np.dtype(dtype).itemsize > 2 else math.sqrt(2) * roundoff(dtype)


def floor(dtype: DTypeLike) -> float:
    """The smallest tolerance that a basis of `dtype` allows: 3.1e-4 in float16, 2.5e-3 in bfloat16.

    A little above the noise, so that half of a roundoff is left to the recurrence.
    """
    return 1.06 * noise(dtype)
