"""Checks of what the losses are given, and its normal form."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from curvax.arrays import into_range, to_array
from curvax.checks import is_integer, shown
from curvax.ops.softmax_ce import Options
from curvax.typing import Batch, DTypeLike, PyTree


class Rows(NamedTuple):
    """Labels in a row, and their shares in the mean.

    Attributes:
        labels: `(N,)` int32.
        shares: `(N,)` weights that sum to 1 over the labels that count.
        weight: the sum of the weights of those, a scalar.
    """

    labels: Array
    shares: Array
    weight: Array


def floating(name: str, value: ArrayLike) -> Array:
    """`value` as an array.

    Raises:
        TypeError: it is not real and floating.
        ValueError: it does not fit in the dtype that JAX narrows it to.
    """
    x = to_array(value, name)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be real and floating, got dtype {x.dtype}")
    return x


def counted_rows(
    shape: tuple[int, ...],
    labels: ArrayLike,
    weights: ArrayLike | None,
    options: Options,
    dtype: DTypeLike,
    may_be_empty: bool,
    of: str,
) -> Rows:
    """The labels and weights of logits of a shape.

    Args:
        shape: `(..., V)`, of the logits.
        labels: `(...)`.
        weights: `(...)` or None.
        options: their `ignore_index` counts; the others must suit `dtype`.
        dtype: of the shares, that of the computation.
        may_be_empty: whether there may be no label to count.
        of: the argument whose shape the labels must match, for messages.

    Raises:
        TypeError: labels that are not integers, weights that are not real, masked arrays.
        ValueError: other shapes; an option out of range; labels that are known and out of range, or
            all ignored; weights that are known and negative, infinite or NaN.
    """
    options.check_range(dtype)
    if isinstance(labels, np.ma.MaskedArray):
        to_array(labels, "labels")  # which refuses it
    # As they come: JAX would wrap wide labels around before they are checked.
    y, vocab = labels if isinstance(labels, Array) else np.asarray(labels), shape[-1]
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {y.dtype}")
    if y.shape != shape[:-1]:
        raise ValueError(
            f"labels must have shape {shape[:-1]}, that of {of} without its last axis, "
            f"got {y.shape}"
        )
    if not isinstance(y, jax.core.Tracer):
        _check_labels(np.asarray(y), vocab, options.ignore_index, may_be_empty)
    w = jnp.ones(y.shape, dtype) if weights is None else to_array(weights, "weights", dtype)
    if w.shape != y.shape:
        raise ValueError(f"weights must have the shape of labels, {y.shape}, got {w.shape}")
    flat = _narrow_labels(y, vocab, options.ignore_index).reshape(-1)
    counted = w.reshape(-1)
    counted = jnp.where(flat == options.ignore_index, jnp.zeros_like(counted), counted)
    scaled, weight = checked_weights(counted)
    return Rows(flat, scaled / jnp.sum(scaled), weight)


def checked_weights(weights: Array) -> tuple[Array, Array]:
    """The weights scaled by a power of two, which have a sum, and the sum of the weights.

    Both are NaN where a weight is negative, infinite or NaN and that is not known yet.

    Raises:
        ValueError: it is known.
    """
    good = jnp.isfinite(weights) & (weights >= 0)
    if not isinstance(good, jax.core.Tracer) and not bool(good.all()):
        raise ValueError(
            "weights must be finite and not negative, got "
            f"{np.asarray(weights)[~np.asarray(good)].flat[0]:g}"
        )
    right = jnp.where(jnp.all(good), 1, jnp.nan).astype(weights.dtype)
    scaled = weights * into_range(jnp.max(weights, initial=0))
    return right * scaled, right * jnp.sum(weights)


def _narrow_labels(labels: PyTree, vocab: int, ignore_index: int) -> Array:
    """The labels in int32, in which one that is out of range stays so."""
    limits = jnp.iinfo(labels.dtype)
    if -(2**31) <= limits.min and limits.max < 2**31:
        return jnp.asarray(labels, jnp.int32)
    bad = jnp.int32(-1 if ignore_index != -1 else -2)
    kept = (labels >= 0) & (labels < vocab)
    if limits.min <= ignore_index <= limits.max:
        kept |= labels == ignore_index
    return jnp.where(kept, labels.astype(jnp.int32), bad)


def _check_labels(labels: PyTree, vocab: int, ignore_index: int, may_be_empty: bool) -> None:
    counted = labels != ignore_index
    bad = counted & ((labels < 0) | (labels >= vocab))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"labels must be in [0, V) with V = {vocab}, or ignore_index = {ignore_index}, got "
            f"{labels[place]} at {place}"
        )
    if not (may_be_empty or counted.any()):
        got = f"{labels.size} of which all are ignore_index = {ignore_index}"
        raise ValueError(
            f"labels must have one to count, got {got if labels.size else 'none'}: a mean over "
            "none is NaN. Where that may happen, pass return_weight=True and leave out what has "
            "weight 0"
        )


def mean_of(total: Array, rows: Rows) -> Array:
    """The mean that shares add up to: NaN over no label at all, as over none that counts."""
    return total if rows.labels.size else jnp.full_like(total, jnp.nan)


def head_operands(hidden: ArrayLike, head: ArrayLike, bias: ArrayLike | None) -> tuple[Array, ...]:
    """Hidden states `(..., D)`, head `(V, D)` and, if there is one, bias `(V,)`.

    Raises:
        TypeError: not real and floating.
        ValueError: other shapes.
    """
    x, w = floating("hidden", hidden), floating("head", head)
    if x.ndim == 0:
        raise ValueError("hidden must have shape (..., D), got a scalar")
    if w.ndim != 2 or w.shape[1] != x.shape[-1] or 0 in w.shape:
        hint = ""
        if w.ndim == 2 and w.shape[0] == x.shape[-1]:
            hint = "; it looks transposed: pass head.T"
        raise ValueError(
            f"head must have shape (V, D) with the width D = {x.shape[-1]} of hidden, and neither "
            f"V nor D 0, got {w.shape}{hint}"
        )
    if bias is None:
        return x, w
    c = floating("bias", bias)
    if c.shape != (w.shape[0],):
        raise ValueError(f"bias must have shape (V,) = ({w.shape[0]},), got {c.shape}")
    return x, w, c


def chunk_rows(chunk: object) -> int | None:
    """`chunk` as a number of rows, None for `"auto"`.

    Raises:
        TypeError: neither an integer nor `"auto"`.
        ValueError: below 1, or another string.
    """
    if isinstance(chunk, str):
        if chunk != "auto":
            raise ValueError(f"chunk must be 'auto' or an integer, got {shown(chunk)}")
        return None
    if not is_integer(chunk):
        raise TypeError(f"chunk must be 'auto' or an integer, got {shown(chunk)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return int(chunk)


def elementwise_weights(
    x: Array, weights: ArrayLike | None, dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Weights of every element of `x`, from weights of its leading axes.

    Returns:
        The weights scaled by a power of two, the sum of these, and that of the weights.

    Raises:
        TypeError: not real.
        ValueError: another shape, or known and negative, infinite or NaN.
    """
    w = jnp.ones((), dtype) if weights is None else to_array(weights, "weights", dtype)
    if w.shape != x.shape[: w.ndim]:
        raise ValueError(
            f"weights must have the shape of outputs, {x.shape}, or of its leading axes, "
            f"got {w.shape}"
        )
    scaled, weight = checked_weights(w)
    inner = math.prod(x.shape[w.ndim :])  # elements of each weight
    whole = jnp.broadcast_to(scaled.reshape(w.shape + (1,) * (x.ndim - w.ndim)), x.shape)
    return whole, inner * jnp.sum(scaled), inner * weight


def count_samples(name: str, x: Array, inner_axes: int, batch: Batch) -> int:
    """The samples of a batch: the length of the leading axis of `x`, and of the batch.

    Args:
        name: of `x`, for messages.
        x: outputs, with an axis of samples before everything else.
        inner_axes: the axes of one label's outputs, which come last.
        batch: what the outputs were computed from.

    Raises:
        ValueError: there is no such axis, or the batch has none of its length.
    """
    lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0}
    if x.ndim <= inner_axes or (lengths and x.shape[0] not in lengths):
        raise ValueError(
            f"{name} must have the samples on a leading axis, as the batch has (of length "
            f"{sorted(lengths)}), for the gradients of single samples: got shape {x.shape}. "
            "Do not flatten the outputs"
        )
    return int(x.shape[0])
