"""Interpolation with antialiasing, which torchax computes by parts of JAX that have changed."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from curvax.adapters.torch.tensor_registry import Lowering, Register


def register_resize(register: Register) -> None:
    """Give the lowerings.

    Args:
        register: takes a lowering.
    """
    aten = torch.ops.aten
    register(aten._upsample_bilinear2d_aa, _resized(_triangle, 1.0))
    register(aten._upsample_bicubic2d_aa, _resized(_cubic, 2.0))


Kernel = Callable[[np.ndarray], np.ndarray]


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys's, with a = -0.5."""
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _resized(kernel: Kernel, support: float) -> Lowering:
    def lowering(
        x: jax.Array,
        output_size: Sequence[int] | None,
        align_corners: bool,
        scales: Sequence[float] | float | None = None,
        *more: float | None,
    ) -> jax.Array:
        factors = scales if isinstance(scales, (list, tuple)) else (scales, *more)
        if output_size is None:
            sizes = zip(x.shape[-2:], factors, strict=True)
            output_size = [int(n * factor) for n, factor in sizes]
        factors = tuple(factors) if len(factors) == 2 else (None, None)
        for axis, out, factor in zip((-2, -1), output_size, factors, strict=True):
            weights = _weights(x.shape[axis], out, align_corners, factor, kernel, support)
            x = jnp.moveaxis(jnp.moveaxis(x, axis, -1) @ weights.astype(x.dtype).T, -1, axis)
        return x

    return lowering


def _weights(
    size: int, out: int, align_corners: bool, factor: float | None, kernel: Kernel, support: float
) -> np.ndarray:
    """Of the inputs along an axis in each output."""
    if align_corners:
        scale = (size - 1) / (out - 1) if out > 1 else 0.0
    else:
        scale = 1 / factor if factor else size / out
    stretch = max(scale, 1.0)
    rows = np.zeros((out, size))
    for i in range(out):
        center = scale * (i + 0.5)
        first = max(int(center - support * stretch + 0.5), 0)
        last = min(int(center + support * stretch + 0.5), size)
        places = np.arange(first, last)
        row = kernel((places - center + 0.5) / stretch)
        rows[i, first:last] = row / row.sum()
    return rows
