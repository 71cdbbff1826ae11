"""Lowerings of convolutions and pools that torchax lacks or has wrong."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from curvax.adapters.torch.tensor_registry import Lowering, Register
from curvax.typing import PyTree, Sizes

Windows = np.ndarray
"""`(out, k)`: the positions of each window along an axis; -1 for what lies outside."""


def register_pools(register: Register) -> None:
    """Give the lowerings.

    Args:
        register: takes a lowering.
    """
    aten = torch.ops.aten
    register(aten.convolution, _convolution)
    for axes, average in enumerate((aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d), start=1):
        register(average, _average_pool(axes))
    for axes, largest in ((2, aten.max_pool2d_with_indices), (3, aten.max_pool3d_with_indices)):
        register(largest, _max_pool(axes))
    register(torch.nn.functional.max_pool2d, _functional_max_pool2d)
    register(aten.adaptive_max_pool2d, _adaptive_max_pool)
    register(aten.adaptive_max_pool3d, _adaptive_max_pool)
    register(aten.max_unpool2d, lambda x, indices, size: _unpool(x, indices, size))
    register(aten.max_unpool3d, lambda x, indices, size, stride, padding: _unpool(x, indices, size))


def _all_axes(value: object, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * axes if len(values) == 1 else values


def _convolution(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> jax.Array:
    axes = weight.ndim - 2
    stride, padding, dilation, more = (
        _all_axes(value, axes) for value in (stride, padding, dilation, output_padding)
    )
    batch = x.shape[: -axes - 1]
    x = x.reshape((-1, *x.shape[-axes - 1 :]))
    if transposed:
        # torch has (in, out / groups, ...), JAX wants (out, in / groups, ...).
        ins, outs, *kernel = weight.shape
        weight = weight.reshape(groups, ins // groups, outs, *kernel).swapaxes(1, 2)
        weight = jnp.flip(weight.reshape(groups * outs, ins // groups, *kernel), range(2, 2 + axes))
        before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        sides = [(low, low + extra) for low, extra in zip(before, more, strict=True)]
        stride, stretch = (1,) * axes, stride
    else:
        sides, stretch = [(p, p) for p in padding], (1,) * axes
    out = jax.lax.conv_general_dilated(
        x,
        weight,
        stride,
        sides,
        lhs_dilation=stretch,
        rhs_dilation=dilation,
        feature_group_count=groups,
    )
    if bias is not None:
        out = out + bias.reshape(-1, *(1,) * axes)
    return out.reshape((*batch, *out.shape[1:]))


def _starts(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool
) -> np.ndarray:
    """Where windows begin along an axis, counted from the first element that is no padding."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (count - 1) * stride >= size + padding:  # none begins in the padding behind
        count -= 1
    return np.arange(count) * stride - padding


def _average_pool(axes: int) -> Lowering:
    def lowering(
        x: jax.Array,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> jax.Array:
        kernel, pads = _all_axes(kernel_size, axes), _all_axes(padding, axes)
        steps = _all_axes(stride, axes) if stride else kernel
        sides, counts = [], []
        for size, k, step, pad in zip(x.shape[-axes:], kernel, steps, pads, strict=True):
            start = _starts(size, k, step, pad, 1, ceil_mode)
            end = np.minimum(start + k, size + pad)
            sides.append((pad, max(0, int(start[-1]) + k - size)))
            inside = np.minimum(end, size) - np.maximum(start, 0)
            counts.append(end - start if count_include_pad else inside)
        outer = (1,) * (x.ndim - axes)
        behind = [(low, high) for low, high in sides]
        total = jax.lax.reduce_window(
            x,
            np.zeros((), x.dtype)[()],
            jax.lax.add,
            (*outer, *kernel),
            (*outer, *steps),
            ((0, 0),) * len(outer) + tuple(behind),
        )
        # Without ceil_mode a last window may be left out.
        total = total[(..., *(slice(0, len(c)) for c in counts))]
        if divisor_override is not None:
            return total / divisor_override
        divisor = counts[0]
        for count in counts[1:]:
            divisor = np.multiply.outer(divisor, count)
        return total / divisor.astype(x.dtype)

    return lowering


def _max_pool(axes: int) -> Lowering:
    def lowering(
        x: jax.Array,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        ceil_mode: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        kernel = _all_axes(kernel_size, axes)
        options = [kernel, _all_axes(stride, axes) if stride else kernel]
        options += [_all_axes(value, axes) for value in (padding, dilation)]
        windows = []
        for size, k, step, pad, spread in zip(x.shape[-axes:], *options, strict=True):
            starts = _starts(size, k, step, pad, spread, ceil_mode)
            places = starts[:, None] + spread * np.arange(k)
            windows.append(np.where((places >= 0) & (places < size), places, -1))
        return _largest(x, windows)

    return lowering


def _functional_max_pool2d(
    x: jax.Array,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> PyTree:
    found = _max_pool(2)(x, kernel_size, stride, padding, dilation, ceil_mode)
    return found if return_indices else found[0]


def _adaptive_max_pool(x: jax.Array, output_size: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    windows = []
    for size, out in zip(x.shape[-len(output_size) :], output_size, strict=True):
        ranges = [range(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
        longest = max(map(len, ranges))
        windows.append(np.asarray([[*r, *[-1] * (longest - len(r))] for r in ranges]))
    return _largest(x, windows)


def _largest(x: jax.Array, windows: Sequence[Windows]) -> tuple[jax.Array, jax.Array]:
    """The first largest element of each window, as torch chooses, and its place."""
    sizes = x.shape[-len(windows) :]
    outs = [len(window) for window in windows]
    flat = x.reshape(*x.shape[: -len(windows)], -1)
    # One comparison for each place in a window: there are few, and their order decides ties.
    best: Any = None
    for offsets in itertools.product(*(range(window.shape[1]) for window in windows)):
        along = [window[:, k] for window, k in zip(windows, offsets, strict=True)]
        grid = np.meshgrid(*along, indexing="ij")
        inside = np.all([g >= 0 for g in grid], axis=0).reshape(-1)
        place = np.ravel_multi_index([np.maximum(g, 0) for g in grid], sizes).reshape(-1)
        value = jnp.where(inside, jax.lax.stop_gradient(flat)[..., place], -jnp.inf)
        taken = jnp.broadcast_to(place, value.shape)
        if best is None:
            best = value, taken
        else:
            better = (value > best[0]) | jnp.isnan(value)
            best = tuple(jnp.where(better, a, b) for a, b in zip((value, taken), best, strict=True))
    shape = (*x.shape[: -len(windows)], *outs)
    values = jnp.take_along_axis(flat, best[1], axis=-1)
    return values.reshape(shape), best[1].reshape(shape).astype(jnp.int64)


def _unpool(x: jax.Array, indices: jax.Array, output_size: Sequence[int]) -> jax.Array:
    axes = len(output_size)
    outer = x.shape[:-axes]
    rows = math.prod(outer)
    flat = jnp.zeros((rows, math.prod(output_size)), x.dtype)
    places = (jnp.arange(rows)[:, None], indices.reshape(rows, -1))
    return flat.at[places].set(x.reshape(rows, -1)).reshape(*outer, *output_size)
