"""The compiled kernels, through XLA's foreign-function interface.

The last result of each call is the kernel's workspace on a GPU, and empty without one.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from curvax import _native
from curvax.ops.block_ortho.arguments import Arguments


def _workspace(op: str, *sizes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((_native.workspace_bytes(op, *sizes),), np.uint8)


def orthonormalize_block(given: Arguments) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.orthonormalize_block`."""
    basis, _, coefficients, factor, info = call_block_ortho(given)
    return basis, coefficients, factor, info


def call_block_ortho(
    given: Arguments,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The bare call, whose second result is what the kernel has left over the block: scratch."""
    basis, block, used, seed, scale, lazy_below = given
    rows, b = basis.shape[0], block.shape[0]
    small = np.dtype(np.float64)
    call = jax.ffi.ffi_call(
        "curvax.block_ortho",
        (
            jax.ShapeDtypeStruct(basis.shape, basis.dtype),
            jax.ShapeDtypeStruct(block.shape, block.dtype),
            jax.ShapeDtypeStruct((rows, b), small),
            jax.ShapeDtypeStruct((b, b), small),
            jax.ShapeDtypeStruct((4,), small),
            _workspace("block_ortho", basis.dtype.name, rows, block.shape[1], b),
        ),
        vmap_method="sequential",
        input_output_aliases={0: 0, 1: 1},
    )
    basis, scratch, coefficients, factor, info, _ = call(
        basis, block, used, seed, scale=np.float64(scale), lazy_below=np.float64(lazy_below)
    )
    return basis, scratch, coefficients, factor, info


def rotate_basis(
    basis: jax.Array, rotation: jax.Array, used: jax.Array, kept: jax.Array
) -> jax.Array:
    """See `api.rotate_basis`."""
    call = jax.ffi.ffi_call(
        "curvax.rotate_basis",
        (
            jax.ShapeDtypeStruct(basis.shape, basis.dtype),
            _workspace("rotate_basis", basis.shape[0]),
        ),
        vmap_method="sequential",
        input_output_aliases={0: 0},
    )
    rotated, _ = call(basis, rotation, used, kept)
    return rotated
