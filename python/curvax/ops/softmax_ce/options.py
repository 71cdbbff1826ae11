"""The options of the softmax cross entropy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Options:
    """Constants of the loss; ``softcap`` is 0 where there is none."""

    softcap: float
    z_loss: float
    label_smoothing: float
    ignore_index: int

    @property
    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of the functions in `api`."""
        return {**dataclasses.asdict(self), "softcap": self.softcap or None}


def compute_dtype(storage: DTypeLike) -> jnp.dtype:
    """The type that logits stored as ``storage`` are computed in, and weights and losses have."""
    return jnp.dtype(jnp.float64 if storage == jnp.float64 else jnp.float32)
