"""Files of older formats, brought to the present one.

Format 1 kept the products of a solve and of its verification of `EigenResult` as one pair, its
bounds (which are its residuals) a second time, the seconds of a linear solve as one number, and no
seconds of the Lanczos recurrence.
"""

from collections.abc import Callable
from typing import Any

# Raised by a change that makes older versions misread new files.
FORMAT = 2


def upgraded(value: Any, format: int) -> Any:
    """What `encoding.encode` made of a value in an older format, as it would be made today.

    Raises:
        KeyError: a record lacks what its format has.
    """
    if format == FORMAT:
        return value
    if isinstance(value, list):
        return [upgraded(entry, format) for entry in value]
    if not isinstance(value, dict):
        return value
    value = {key: upgraded(entry, format) for key, entry in value.items()}
    if value.get("kind") == "record" and value["class"] in _CHANGED:
        fields = dict(value["fields"])
        _CHANGED[value["class"]](fields)
        value["fields"] = fields
    return value


def _eigen(fields: dict[str, Any]) -> None:
    del fields["bounds"]
    counts = fields["num_matvecs"]["fields"]
    fields["num_matvecs"], fields["num_verification"] = counts["solve"], counts["verification"]


def _solution(fields: dict[str, Any]) -> None:
    # One product measured the residual; those that looked for a reason were not told apart.
    fields["num_matvecs"], fields["num_verification"] = fields["num_matvecs"] - 1, 1
    fields["seconds"] = {"kind": "dict", "items": [["total", fields["seconds"]]]}


def _lanczos(fields: dict[str, Any]) -> None:
    fields["seconds"] = {"kind": "dict", "items": []}


_CHANGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "EigenResult": _eigen,
    "LanczosTridiagonal": _lanczos,
    "SolveResult": _solution,
}
