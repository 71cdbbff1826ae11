"""Parameters from files, in formats that hold numbers and cannot run code."""

import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.adapters.frameworks import import_framework
from curvax.archives import check_headers
from curvax.arrays import to_array
from curvax.typing import Params

REFUSED = {
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".joblib": "pickle",
}
"""Formats that can execute code on load, and what wrote them."""


def load(path: str | Path) -> Params:
    """The parameters in a file.

    Args:
        path: `.json`, nested dicts of nested lists of numbers; `.npz`, arrays by name, without
            pickled objects; `.safetensors`, tensors by name; `.gguf`, tensors by name, of which the
            quantised become float32.

    Returns:
        A dict of JAX arrays by name; of JSON a dict with the structure of the file's dicts, in
        which numbers and lists of numbers are float32 arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a file that is not what its name says, a list that is ragged or
            holds something else than numbers, values that are NaN or infinite, or float64 with
            JAX's 64-bit mode off.
        ImportError: `.safetensors` or `.gguf` without the package that reads it.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Params]] = {
        ".json": _read_json,
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".gguf": _read_gguf,
    }
    if path.suffix in REFUSED:
        raise ValueError(
            f"{str(path)!r} is a {REFUSED[path.suffix]} file, which can run code on load: "
            "convert it where you trust it, as by safetensors.torch.save_file(state_dict, path), "
            "and load the .safetensors file"
        )
    if path.suffix not in readers:
        raise ValueError(
            f"path must end in one of {', '.join(readers)}, got {str(path)!r}; Keras files are for "
            "adapters.keras.from_model"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    params = readers[path.suffix](path)
    if not params:
        raise ValueError(f"{str(path)!r} holds no parameters")
    return params


def _read_json(path: Path) -> Params:
    try:
        read = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _mismatch(path, "JSON", error) from error
    if not isinstance(read, dict):
        raise ValueError(
            f"{str(path)!r} must hold an object of parameters by name, got a {type(read).__name__}"
        )
    return _from_json(read, path, "")


def _from_json(node: object, path: Path, name: str) -> Params:
    if isinstance(node, dict):
        return {
            key: _from_json(value, path, f"{name}.{key}" if name else key)
            for key, value in node.items()
        }
    try:
        array = np.asarray(node, np.float32)
        plain = not _has_text(node)
    except (ValueError, TypeError):
        plain = False
    if not plain:
        raise ValueError(
            f"{name!r} in {str(path)!r} must be a number or a list of lists of equal lengths of "
            "numbers"
        )
    return _checked(lambda: array, path, name)


def _has_text(node: object) -> bool:
    """Whether a nested list holds anything but numbers: NumPy would read the text of a number."""
    if isinstance(node, list):
        return any(map(_has_text, node))
    return isinstance(node, bool) or not isinstance(node, (int, float))


def _read_npz(path: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise _mismatch(path, "NPZ", "it is no archive")
    try:
        with path.open("rb") as stream:
            check_headers(stream)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise _mismatch(path, "NPZ", error) from error
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                name: _checked(partial(arrays.__getitem__, name), path, name)
                for name in arrays.files
            }
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise _mismatch(path, "NPZ", error) from error


def _read_safetensors(path: Path) -> dict[str, Array]:
    reader = import_framework("safetensors", "files")
    try:
        with reader.safe_open(path, framework="numpy") as tensors:
            return {
                name: _checked(partial(tensors.get_tensor, name), path, name)
                for name in tensors.keys()
            }
    except reader.SafetensorError as error:
        raise _mismatch(path, "safetensors", error) from error


def _read_gguf(path: Path) -> dict[str, Array]:
    gguf = import_framework("gguf", "files")
    with path.open("rb") as file:
        begins = file.read(4)
    if begins != b"GGUF":
        raise _mismatch(path, "GGUF", "it does not begin with GGUF")
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError) as error:
        raise _mismatch(path, "GGUF", error) from error
    return {t.name: _checked(partial(_dequantized, t), path, t.name) for t in tensors}


def _dequantized(tensor: Any) -> np.ndarray:
    gguf = import_framework("gguf", "files")
    # The file has the fastest axis first.
    shape = tuple(map(int, tensor.shape[::-1]))
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def _mismatch(path: Path, kind: str, error: object) -> ValueError:
    return ValueError(f"{str(path)!r} is not the {kind} file that its name says: {error}")


def _checked(read: Callable[[], np.ndarray], path: Path, name: str) -> Array:
    try:
        array = np.asarray(read())
    except ValueError as error:  # NumPy's refusal of pickled objects
        raise ValueError(
            f"{name!r} in {str(path)!r} is not an array of numbers: {error}"
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{name!r} in {str(path)!r} is not an array of numbers")
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
        raise ValueError(f"{name!r} in {str(path)!r} is not finite: it has NaN or infinite entries")
    if array.dtype == np.float64 and jnp.asarray(0.0).dtype != jnp.float64:
        raise ValueError(
            f"{name!r} in {str(path)!r} is float64, but JAX's 64-bit mode is off: set "
            "jax.config.update('jax_enable_x64', True) first, or save it as float32"
        )
    return to_array(array, f"{name!r} in {str(path)!r}")
