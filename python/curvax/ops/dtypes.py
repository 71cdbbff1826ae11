"""Types that arrays are stored in, and the type that each is computed in."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

__all__ = ["check_storage", "compute_dtype"]


def compute_dtype(storage: DTypeLike) -> jnp.dtype:
    """What is stored as ``storage`` is computed in float32, or in float64 if it is float64."""
    return jnp.dtype(jnp.float64 if storage == jnp.float64 else jnp.float32)


def check_storage(name: str, dtype: DTypeLike) -> None:
    """Refuse a type that the kernels do not read.

    Raises:
        ValueError: as said.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got dtype {dtype}")
