"""The options of the softmax cross entropy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from curvax.checks import shown


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


def options_of(
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    place: str = "{}",
) -> Options:
    """The static options of a cross entropy; `place` is how messages write an argument's name.

    Raises:
        TypeError: an option that is not a number.
        ValueError: one out of range.
    """
    smoothing = _number(place.format("label_smoothing"), label_smoothing)
    z, name = _number(place.format("z_loss"), z_loss), place.format("softcap")
    cap = None if softcap is None else _number(name, softcap)
    if cap is not None and not cap > 0:
        raise ValueError(f"{name} must be positive or None, got {softcap}")
    if not 0 <= smoothing <= 1:
        name = place.format("label_smoothing")
        raise ValueError(f"{name} must be in [0, 1], got {label_smoothing}")
    name = place.format("ignore_index")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {shown(ignore_index)}")
    if not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"{name} must fit in 32 bits, got {ignore_index}")
    return Options(cap or 0.0, z, smoothing, int(ignore_index))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(
            f"{name} must be a number known when the loss is traced, got {shown(value)}"
        )
    if not np.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_range(options: Options, dtype: DTypeLike, place: str = "{}") -> None:
    """Refuse options that the computation has no numbers for.

    Args:
        options: the options.
        dtype: what is computed in, see `compute_dtype`.
        place: how the message writes an argument's name.

    Raises:
        ValueError: a `z_loss` that is infinite in `dtype`, or a `softcap` s of which 2/s² is, or
            by which eps, divided, is no normal number.
    """
    info = jnp.finfo(dtype)
    cap, low, high = options.softcap, float(info.tiny) ** 0.5, float(info.eps / info.tiny)
    if cap and not low <= cap <= high:
        raise ValueError(
            f"{place.format('softcap')} must be in [{low:.2g}, {high:.2g}] for a computation in "
            f"{jnp.dtype(dtype)}, got {cap:g}: a softcap far above all logits is None"
        )
    if abs(options.z_loss) > float(info.max):
        raise ValueError(
            f"{place.format('z_loss')} must be at most {info.max:.2g} for a computation in "
            f"{jnp.dtype(dtype)}, got {options.z_loss:g}"
        )
