"""Checks of what attention is given, and its normal form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import to_array
from curvax.checks import check_count, check_flag, is_number, shown
from curvax.ops.attention import Masks, Options, check_impl
from curvax.ops.dtypes import check_storage, compute_dtype


def implementation_of(impl: str, implementation: str | None) -> str:
    """The one that is given.

    Raises:
        TypeError: not a string.
        ValueError: not a known word, or both are given.
    """
    if implementation is None:
        return check_impl("impl", impl)
    if impl != "auto":
        raise ValueError(
            f"impl and implementation are one argument, got impl={shown(impl)} and "
            f"implementation={shown(implementation)}: leave one out"
        )
    return check_impl("implementation", implementation)


def operands(query: object, key: object, value: object, bias: object) -> tuple[Array, ...]:
    """Query, key, value, and the bias if there is one, with a batch axis.

    Raises:
        TypeError: one that is not real and floating.
        ValueError: shapes or dtypes that do not match, or float64 without 64-bit mode.
    """
    q, k, v = (_floating(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    check_storage("query", q.dtype)
    if q.ndim not in (3, 4) or q.shape[-1] == 0:
        raise ValueError(f"query must have shape (B, T, N, H) or (T, N, H), H > 0, got {q.shape}")
    batch, (_, heads, width) = q.shape[:-3], q.shape[-3:]
    expected = f"({''.join(f'{n}, ' for n in batch)}S, K, {width}) for query of shape {q.shape}"
    if k.ndim != q.ndim or (*k.shape[:-3], k.shape[-1]) != (*batch, width):
        raise ValueError(f"key must have shape {expected}, got {k.shape}")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(
            f"key must have a number of heads, axis {k.ndim - 2}, that divides the {heads} of "
            f"query, got {k.shape[-2]}"
        )
    if v.shape != k.shape:
        raise ValueError(f"value must have the shape of key, {k.shape}, got {v.shape}")
    for name, x in (("key", k), ("value", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of query, {q.dtype}, got {x.dtype}")
    slots = tuple(x if batch else x[None] for x in (q, k, v))
    if bias is None:
        return slots
    return (*slots, _pairs("bias", _floating("bias", bias), slots))


def _floating(name: str, value: object) -> Array:
    # torch's dtypes too: its name is in the text.
    wide = str(getattr(value, "dtype", "")).endswith("float64")
    if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} must be of 32 bits or less with JAX's 64-bit mode off, got float64: switch it "
            "on, jax.config.update('jax_enable_x64', True), or convert it, "
            f"{name}.astype('float32')"
        )
    x = to_array(value, name)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be real and floating, got dtype {x.dtype}")
    return x


def _sizes(slots: Sequence[Array]) -> tuple[int, int, int, int]:
    """B, N, T and S."""
    (batch, queries, heads, _), keys = slots[0].shape, slots[1].shape[1]
    return batch, heads, queries, keys


def _pairs(name: str, x: Array, slots: Sequence[Array]) -> Array:
    """`x` with four axes."""
    sizes = _sizes(slots)
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or any(n not in (1, size) for n, size in zip(shape, sizes, strict=True)):
        raise ValueError(
            f"{name} must have a shape that broadcasts to (B, N, T, S) = {sizes}, got {x.shape}"
        )
    return x.reshape(shape)


def options_of(
    slots: Sequence[Array],
    scale: object,
    softcap: object,
    is_causal: object,
    local_window_size: object,
) -> Options:
    """The static options.

    Raises:
        TypeError: one of another type.
        ValueError: one out of range.
    """
    _, _, queries, keys = _sizes(slots)
    cap = None if softcap is None else _number("softcap", softcap)
    if cap is not None and not cap > 0:
        raise ValueError(f"softcap must be positive or None, got {cap:g}")
    options = Options(
        scale=1 / math.sqrt(slots[0].shape[-1]) if scale is None else _number("scale", scale),
        softcap=cap,
        is_causal=check_flag("is_causal", is_causal),
        window=_window(local_window_size, queries + keys),
    )
    options.check_range(compute_dtype(slots[0].dtype))
    return options


def _number(name: str, value: object) -> float:
    if not is_number(value):
        raise TypeError(
            f"{name} must be a number known when attention is traced, got {shown(value)}"
        )
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _window(value: object, most: int) -> tuple[int, int] | None:
    """(left, right), neither larger than `most`, beyond which nothing is."""
    if value is None:
        return None
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(
            f"local_window_size must be an integer or (left, right), got {shown(value)}"
        )
    left, right = (min(check_count("local_window_size", n, low=0), most) for n in pair)
    return left, right


def masks_of(
    slots: Sequence[Array],
    batched: bool,
    mask: object,
    query_lengths: object,
    key_lengths: object,
    query_segments: object,
    key_segments: object,
) -> Masks:
    """What of the masks is known at run time.

    Args:
        slots: with a batch axis.
        batched: whether the arrays came with it, as the segment ids then do.
        mask: as of attention, and so are the others.
        query_lengths: see above.
        key_lengths: see above.
        query_segments: see above.
        key_segments: see above.

    Raises:
        TypeError: a mask that is not bool, lengths or ids that are not integers.
        ValueError: another shape, lengths that are known and out of range, or ids of queries or
            keys alone.
    """
    batch, _, queries, keys = _sizes(slots)
    allowed = None if mask is None else to_array(mask, "mask")
    if allowed is not None and allowed.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be of dtype bool, got {allowed.dtype}: a mask that is added to the logits "
            "is a bias"
        )
    if (query_segments is None) != (key_segments is None):
        missing, other = "query_segment_ids", "key_value_segment_ids"
        if key_segments is None:
            missing, other = other, missing
        raise ValueError(f"{missing} must be given where {other} is, got None")
    return Masks(
        None if allowed is None else _pairs("mask", allowed, slots),
        _lengths("query_seq_lengths", query_lengths, batch, queries),
        _lengths("key_value_seq_lengths", key_lengths, batch, keys),
        _segments("query_segment_ids", query_segments, batch if batched else None, queries),
        _segments("key_value_segment_ids", key_segments, batch if batched else None, keys),
    )


def _lengths(name: str, value: object, batch: int, most: int) -> Array | None:
    if value is None:
        return None
    x = _integers(name, value, (batch,))
    if not isinstance(x, jax.core.Tracer):
        known = np.asarray(x)
        bad = known[(known < 0) | (known > most)]
        if bad.size:
            raise ValueError(f"{name} must be in [0, {most}], got {bad[0]}")
    return x


def _segments(name: str, value: object, batch: int | None, size: int) -> Array | None:
    if value is None:
        return None
    x = _integers(name, value, (size,) if batch is None else (batch, size))
    return x.reshape(-1, size)


def _integers(name: str, value: object, shape: tuple[int, ...]) -> Array:
    x = to_array(value, name)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got dtype {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {x.shape}")
    return to_array(x, name, jnp.int32)
