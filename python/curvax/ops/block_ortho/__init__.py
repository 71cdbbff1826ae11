"""Orthonormalisation of a block of vectors against a basis, and rotation of the basis in place."""

from curvax.ops.block_ortho.api import (
    MAX_BLOCK,
    orthonormalize_block,
    padded_length,
    rotate_basis,
)

__all__ = ["MAX_BLOCK", "orthonormalize_block", "padded_length", "rotate_basis"]
