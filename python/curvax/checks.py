"""Checks of plain arguments: numbers, counts, flags."""

import math
from typing import Any

import numpy as np


def check_integer(name: str, value: Any, low: int) -> int | None:
    """`value`, an integer of at least `low`, or None.

    Raises:
        TypeError: neither an integer nor None.
        ValueError: too small.
    """
    return None if value is None else check_count(name, value, low)


def check_count(name: str, value: Any, low: int, why: str = "") -> int:
    """`value`, an integer of at least `low`, which is not optional.

    Raises:
        TypeError: not an integer.
        ValueError: too small; the message ends with `why`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}{why}")
    return int(value)


def check_number(name: str, value: Any, positive: bool = False) -> float:
    """`value`, a finite real number that is not negative, or, if asked for, positive.

    Raises:
        TypeError: not a real number.
        ValueError: not finite, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "positive and finite" if positive else "finite and not negative"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """`value`, True or False.

    Raises:
        TypeError: neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)
