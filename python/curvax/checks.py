"""Checks of plain arguments: numbers, counts, flags, choices, seeds, callbacks."""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The longest text of a single value in a message, and the most entries of a container.
_LONGEST = 160
_ENTRIES = 4


def shown(value: Any, depth: int = 2) -> str:
    """`value` for a message: its `repr` where that is short, else what it is.

    Arrays are told by shape and dtype, and containers by their first entries.
    """
    shape, dtype, kind = getattr(value, "shape", None), getattr(value, "dtype", None), type(value)
    if isinstance(shape, tuple) and dtype is not None and not isinstance(value, np.generic):
        return f"{kind.__name__} of shape {shape} and dtype {dtype}"
    if isinstance(value, Mapping) or kind in (list, tuple, set, frozenset):
        return _shown_container(value, depth)
    return cut(repr(value))


def _shown_container(value: Any, depth: int) -> str:
    begin, end = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
    if depth == 0 and len(value):
        return f"{begin}...{end}"
    some = list(value.items() if isinstance(value, Mapping) else value)[:_ENTRIES]
    if isinstance(value, Mapping):
        entries = [f"{cut(repr(key))}: {shown(entry, depth - 1)}" for key, entry in some]
    else:
        entries = [shown(entry, depth - 1) for entry in some]
    if len(value) > _ENTRIES:
        entries.append(f"and {len(value) - _ENTRIES} more")
    elif len(value) == 1 and isinstance(value, tuple):
        end = ",)"
    return f"{begin}{', '.join(entries)}{end}"


def cut(text: str) -> str:
    """The text, without its middle if it is long."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 4 :]}"


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a number of Python's or NumPy's, and no bool."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


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
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}{why}")
    return int(value)


def check_number(name: str, value: Any, positive: bool = False) -> float:
    """`value`, a finite real number that is not negative, or, if asked for, positive.

    Raises:
        TypeError: not a real number.
        ValueError: not finite, or too small.
    """
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        allowed = "positive and finite" if positive else "finite and not negative"
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """`value`, True or False.

    Raises:
        TypeError: neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_choice(name: str, value: Any, allowed: Sequence[str], also: str = "") -> str:
    """`value`, one of the strings `allowed`; messages say what is allowed `also`.

    Raises:
        TypeError: not a string.
        ValueError: another string.
    """
    if not isinstance(value, str) or value not in allowed:
        wrong = ValueError if isinstance(value, str) else TypeError
        raise wrong(f"{name} must be one of {tuple(allowed)}{also}, got {shown(value)}")
    return value


def check_seed(seed: Any) -> int:
    """The seed, drawn if it is None."""
    given = check_integer("seed", seed, low=0)
    return secrets.randbits(32) if given is None else given


def seed_word(seed: int) -> np.uint32:
    """The part of a seed that counts: its low 32 bits."""
    return np.uint32(seed & 0xFFFFFFFF)


def check_callback(callback: Any) -> Any:
    """The callback, or None.

    Raises:
        TypeError: it cannot be called.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {shown(callback)}")
    return callback
