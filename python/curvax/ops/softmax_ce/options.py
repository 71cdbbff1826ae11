"""The options of the softmax cross entropy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from curvax.checks import is_integer, is_number, shown


@dataclasses.dataclass(frozen=True)
class Options:
    """Constants of the loss, checked where they are made.

    Attributes:
        softcap: cap ``s`` of the logits, ``z = s tanh(logits / s)``; None for none.
        z_loss: factor of the squared log-sum-exp.
        label_smoothing: share of the target spread evenly over the vocabulary, in ``[0, 1]``.
        ignore_index: label of rows to leave out.

    Raises:
        TypeError: one that is not a number, or, of `ignore_index`, not an integer.
        ValueError: one out of range.
    """

    softcap: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        cap = None if self.softcap is None else _number("softcap", self.softcap)
        if cap is not None and not cap > 0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")
        smoothing, index = _number("label_smoothing", self.label_smoothing), self.ignore_index
        if not 0 <= smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if not is_integer(index):
            raise TypeError(f"ignore_index must be an integer, got {shown(index)}")
        if not -(2**31) <= index < 2**31:
            raise ValueError(f"ignore_index must fit in 32 bits, got {index}")
        # As Python's numbers, since options are keys of compiled programs.
        for name, value in (
            ("softcap", cap),
            ("z_loss", _number("z_loss", self.z_loss)),
            ("label_smoothing", smoothing),
            ("ignore_index", int(index)),
        ):
            object.__setattr__(self, name, value)

    def check_range(self, dtype: DTypeLike) -> None:
        """Refuse options that a computation in `dtype` has no numbers for.

        Raises:
            ValueError: a `z_loss` that is infinite there, or a `softcap` s of which 2/s² is, or by
                which eps, divided, is no normal number.
        """
        info, where = jnp.finfo(dtype), f"for a computation in {jnp.dtype(dtype)}"
        cap, low, high = self.softcap, float(info.tiny) ** 0.5, float(info.eps / info.tiny)
        if cap is not None and not low <= cap <= high:
            raise ValueError(
                f"softcap must be in [{low:.2g}, {high:.2g}] {where}, got {cap:g}: a softcap far "
                "above all logits is None"
            )
        if abs(self.z_loss) > float(info.max):
            raise ValueError(f"z_loss must be at most {info.max:.2g} {where}, got {self.z_loss:g}")


def _number(name: str, value: Any) -> float:
    if not is_number(value):
        raise TypeError(
            f"{name} must be a number known when the loss is traced, got {shown(value)}"
        )
    if not np.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
