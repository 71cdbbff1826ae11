"""The compiled kernels, through XLA's foreign-function interface."""

from __future__ import annotations

import jax
import numpy as np


def orthonormalize_block(
    basis: jax.Array, block: jax.Array, used: jax.Array, seed: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.orthonormalize_block`."""
    new_basis, _, coefficients, factor, info = call_block_ortho(basis, block, used, seed, scale)
    return new_basis, coefficients, factor, info


def call_block_ortho(
    basis: jax.Array, block: jax.Array, used: jax.Array, seed: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The bare call, whose second result is what the kernel has left over the block: scratch."""
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
    basis, scratch, coefficients, factor, info = call(
        basis, block, used, seed, scale=np.float64(scale)
    )
    return basis, scratch, coefficients, factor, info


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
