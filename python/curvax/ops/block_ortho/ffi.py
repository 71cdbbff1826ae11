"""The compiled kernels, through XLA's foreign-function interface."""

from __future__ import annotations

import jax
import numpy as np


def orthonormalize_block(
    basis: jax.Array, block: jax.Array, used: jax.Array, seed: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.orthonormalize_block`. The second result, scratch over the block, is dropped."""
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
        ),
        vmap_method="sequential",
        input_output_aliases={0: 0, 1: 1},
    )
    new_basis, _, coefficients, factor, info = call(
        basis, block, used, seed, scale=np.float64(scale)
    )
    return new_basis, coefficients, factor, info


def rotate_basis(
    basis: jax.Array, rotation: jax.Array, used: jax.Array, kept: jax.Array
) -> jax.Array:
    """See `api.rotate_basis`."""
    call = jax.ffi.ffi_call(
        "curvax.rotate_basis",
        jax.ShapeDtypeStruct(basis.shape, basis.dtype),
        vmap_method="sequential",
        input_output_aliases={0: 0},
    )
    return call(basis, rotation, used, kept)
