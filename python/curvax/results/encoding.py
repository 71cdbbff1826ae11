"""Values as JSON and arrays: all that a `.npz` file needs to hold them without pickle.

JSON keeps None, bool, int, float, str and lists as they are. Whatever else is a JSON object whose
`kind` says how to read it back:

    tuple    items
    dict     items: pairs of key and value, so that keys need not be strings
    scalar   dtype, value: a NumPy scalar
    array    name (in the npz), dtype
    record   class, fields: a NamedTuple or a result
"""

import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

import jax
import numpy as np

from curvax.filters import leaf_names
from curvax.typing import PyTree

Arrays = dict[str, np.ndarray]
_Class = TypeVar("_Class", bound=type)

_RECORDS: dict[str, type] = {}
_PLAIN = (type(None), bool, int, float, str)

# A zip archive takes longer names, but nobody reads them.
_MAX_NAME = 200


def record(cls: _Class) -> _Class:
    """Let files name `cls`, a NamedTuple or a dataclass, and restore it from its fields."""
    _RECORDS[cls.__name__] = cls
    return cls


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a NamedTuple or a dataclass, by name."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value._asdict()


def encode(value: Any, name: str, arrays: Arrays) -> Any:
    """What JSON holds of a value.

    Args:
        value: None, a number, a string, an array, a record, a list, tuple or dict of such; any
            other node of a pytree becomes a dict of its leaves by name.
        name: of the value, for the names of its arrays and for messages.
        arrays: receives the arrays, under names that are unique in it.

    Raises:
        TypeError: something else.
    """
    kind = type(value)
    if _is_plain(value):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "biufV" and _is_plain(value.item()):
        scalar = {"kind": "scalar", "dtype": value.dtype.name, "value": value.item()}
        # A NaN has bits of its own, which a conversion may change.
        return scalar | {"bits": value.tobytes().hex()} if value != value else scalar
    if isinstance(value, (np.ndarray, jax.Array)):
        return _encode_array(np.asarray(value), name, arrays)
    if kind is list:
        return [encode(entry, f"{name}.{i}", arrays) for i, entry in enumerate(value)]
    if kind is tuple:
        items = [encode(entry, f"{name}.{i}", arrays) for i, entry in enumerate(value)]
        return {"kind": "tuple", "items": items}
    if kind is dict:
        pairs = [
            [encode(key, name, arrays), encode(entry, f"{name}.{key}", arrays)]
            for key, entry in value.items()
        ]
        return {"kind": "dict", "items": pairs}
    if _RECORDS.get(kind.__name__) is kind:
        prefix = f"{name}." if name else ""
        fields = {
            key: encode(entry, prefix + key, arrays) for key, entry in fields_of(value).items()
        }
        return {"kind": "record", "class": kind.__name__, "fields": fields}
    return encode(_leaves_by_name(value, name), name, arrays)


def decode(value: object, arrays: Arrays) -> Any:
    """The value that `encode` was given.

    Raises:
        LookupError, TypeError, ValueError: not what `encode` makes, or an unknown class.
    """
    if isinstance(value, list):
        return [decode(entry, arrays) for entry in value]
    if not isinstance(value, dict):
        return value
    kind = value["kind"]
    if kind == "tuple":
        return tuple(decode(entry, arrays) for entry in value["items"])
    if kind == "dict":
        return {decode(key, arrays): decode(entry, arrays) for key, entry in value["items"]}
    if kind == "scalar":
        if "bits" in value:
            return np.frombuffer(bytes.fromhex(value["bits"]), value["dtype"])[0]
        return np.dtype(value["dtype"]).type(value["value"])
    if kind == "array":
        return _decode_array(arrays[value["name"]], value["dtype"])
    if kind == "record":
        if value["class"] not in _RECORDS:
            raise ValueError(
                f"it holds a {value['class']}, which is not known here: upgrade curvax, or import "
                "the module that defines it"
            )
        fields = {key: decode(entry, arrays) for key, entry in value["fields"].items()}
        return _RECORDS[value["class"]](**fields)
    raise ValueError(f"{kind!r} is no kind of value")


def _is_plain(value: object) -> bool:
    # Not isinstance: NumPy's float64 is a float, but its type is to be restored.
    return type(value) in _PLAIN


def _is_extension(dtype: np.dtype) -> bool:
    """Whether it is one of JAX's own (bfloat16, float8), which `.npy` files cannot name."""
    return dtype.isbuiltin == 2


def _encode_array(value: np.ndarray, name: str, arrays: Arrays) -> dict[str, object]:
    if value.dtype.hasobject:
        raise TypeError(f"{name} must hold numbers to be saved, got an array of Python objects")
    name = _unique("".join(c if c.isprintable() and c not in "/\\" else "_" for c in name), arrays)
    dtype = value.dtype
    arrays[name] = value.view(f"u{dtype.itemsize}") if _is_extension(dtype) else value
    return {"kind": "array", "name": name, "dtype": dtype.name}


def _decode_array(stored: np.ndarray, dtype: str) -> np.ndarray:
    if stored.dtype.name == dtype:
        return stored
    return stored.view(np.dtype(dtype))


def _leaves_by_name(tree: PyTree, name: str) -> dict[str, PyTree]:
    leaves, names = jax.tree.leaves(tree), leaf_names(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        raise TypeError(
            f"{name} cannot be saved: expected arrays, numbers and containers of them, got "
            f"{type(tree).__name__}"
        )
    named: dict[str, PyTree] = {}
    for key, leaf in zip(names, leaves, strict=True):
        named[_unique(key, named)] = np.asarray(leaf)
    return named


def _unique(name: str, taken: Collection[str]) -> str:
    short = name[:_MAX_NAME]
    candidates = (short if i == 1 else f"{short}~{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)
