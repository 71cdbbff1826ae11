"""Arrays of others as JAX's, with nothing lost on the way but rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.checks import shown
from curvax.program import present, traced
from curvax.typing import DTypeLike

_WIDE = "switch JAX's 64-bit mode on, jax.config.update('jax_enable_x64', True)"


def to_array(value: object, what: str, dtype: DTypeLike | None = None) -> Array:
    """`value` as an array of JAX.

    Args:
        value: an array of JAX, NumPy or torch, or a number.
        what: its name, for messages.
        dtype: of the result; None for the dtype of `value`, in 32 bits with JAX's 64-bit mode off.

    Raises:
        TypeError: no array of numbers, an array with a mask, or numbers that `dtype` has not
            (complex, or with a fraction).
        ValueError: numbers beyond the range of the dtype, which would wrap around or be infinite.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{what} is a NumPy masked array, whose mask would be ignored: fill it, "
            "array.filled(value), or pass the mask beside the data, as weights in the loss"
        )
    if isinstance(value, Array) or hasattr(value, "__jax_array__"):
        array = value if isinstance(value, Array) else jnp.asarray(value)
        # Compared as they are: the dtype of random keys is none of NumPy.
        if dtype is None or array.dtype == dtype:
            return array
        target = jnp.dtype(dtype)
        _check_kind(array.dtype, target, what)
        if not isinstance(array, jax.core.Tracer):
            _check_range(np.asarray(array), target, what)
        return array.astype(target)
    host = _on_host(value, what)
    target = jax.dtypes.canonicalize_dtype(host.dtype) if dtype is None else jnp.dtype(dtype)
    if host.dtype != target:
        _check_kind(host.dtype, target, what)
        _check_range(host, target, what)
    present()
    # A number without a dtype of its own takes that of what it meets.
    plain = dtype is None and isinstance(value, (bool, int, float, complex))
    if plain and not isinstance(value, np.generic):
        return jnp.asarray(value)
    # A copy: JAX may share aligned memory, which the caller may write to. By `device_put`, since
    # `jnp.asarray` compiles a program for each shape.
    return jax.device_put(host.astype(target))


def scale_of(x: Array, axis: int | None = None) -> Array:
    """The largest magnitude along an axis, which is kept; 1 where that is zero.

    Numbers divided by it have squares in range: those of small or large ones leave that of float32.
    """
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None, initial=0)
    return jnp.where(largest > 0, largest, 1)


def unit_rows(rows: Array) -> tuple[Array, Array]:
    """Rows divided by their norms, and these in units of each row's largest magnitude."""
    scaled = rows / scale_of(rows, axis=1)
    norms = jnp.linalg.norm(scaled, axis=1)
    return scaled / norms[:, None], norms


def shares(weights: Array, total: Array) -> Array:
    """`weights / total`, where the reciprocal of the total, by which XLA multiplies, underflows."""
    scale = into_range(total)
    return weights * scale / (total * scale)


def into_range(largest: Array) -> Array:
    """A power of two: numbers up to `largest`, times it, have sums and reciprocals in float32."""
    return jnp.where(largest > 1, 2.0**-64, 2.0**64).astype(largest.dtype)


def _on_host(value: Any, what: str) -> np.ndarray:
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a tensor of torch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy has not
            value = value.float()
    try:
        host = np.asarray(value)
    except ValueError:  # rows of different lengths
        host = np.asarray(None)
    if not (jnp.issubdtype(host.dtype, jnp.number) or host.dtype == np.bool_):
        raise TypeError(f"{what} must be an array of numbers, got {shown(value)}")
    return host


def _check_kind(source: np.dtype, target: np.dtype, what: str) -> None:
    """Refuse numbers of a kind that `target` has not."""
    is_complex, inexact = jnp.complexfloating, jnp.inexact
    if jnp.issubdtype(source, is_complex) and not jnp.issubdtype(target, is_complex):
        raise TypeError(f"{what} must be real, got {jax.dtypes.canonicalize_dtype(source)}")
    fraction = jnp.issubdtype(source, inexact) and not jnp.issubdtype(target, inexact)
    if fraction or target == np.bool_:
        raise TypeError(f"{what} must be of dtype {target}, got {source}")


def _check_range(array: np.ndarray, target: np.dtype, what: str) -> None:
    """Refuse numbers that would wrap around in `target`, or be infinite."""
    source, far = array.dtype, None
    if not array.size:
        return
    if jnp.issubdtype(target, jnp.integer):
        limits, ends = jnp.iinfo(target), (int(array.min()), int(array.max()))
        far = next((end for end in ends if not limits.min <= end <= limits.max), None)
    elif jnp.issubdtype(source, jnp.inexact):
        if float(jnp.finfo(target).max) >= float(jnp.finfo(source).max):
            return
        with np.errstate(over="ignore"):
            lost = np.isfinite(array) & ~np.isfinite(array.astype(target))
        far = array[lost].flat[0] if lost.any() else None
    if far is not None:
        raise ValueError(
            f"{what} must fit in {target}, to which {source} is narrowed, got {far}: {_WIDE}, or "
            "check the data"
        )


def reject_tracers(caller: str, *values: object) -> None:
    """Refuse to run inside a transformation.

    Raises:
        TypeError: a value is traced, or what is computed here would be.
    """
    if traced(*values):
        raise TypeError(
            f"{caller} runs on the host: call it outside jax.jit, jax.vmap and jax.grad"
        )
