"""The compiled kernels, through XLA's foreign-function interface.

The last result of each call is the kernel's workspace on a GPU, and empty without one.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from curvax import _native
from curvax.ops.dtypes import compute_dtype
from curvax.ops.manual_axes import vary, varying
from curvax.ops.softmax_ce.options import Options


def _attributes(options: Options) -> dict[str, Any]:
    """As the kernels read them: a softcap of 0 is none."""
    return {
        "softcap": np.float64(options.softcap or 0),
        "z_loss": np.float64(options.z_loss),
        "label_smoothing": np.float64(options.label_smoothing),
        "ignore_index": np.int64(options.ignore_index),
    }


def _workspace(logits: jax.Array, tangents: jax.Array) -> jax.ShapeDtypeStruct:
    count = tangents.shape[0] if tangents.ndim == 3 else 1
    sizes = (logits.dtype.name, *logits.shape, count)
    return jax.ShapeDtypeStruct((_native.workspace_bytes("softmax_ce", *sizes),), np.uint8)


def hvp(
    logits: jax.Array, tangents: jax.Array, labels: jax.Array, weights: jax.Array, options: Options
) -> jax.Array:
    """Products over the tangents; `sequential`: vmap must not copy logits that are not mapped."""
    call = jax.ffi.ffi_call(
        "curvax.softmax_ce_hvp",
        (
            jax.ShapeDtypeStruct(tangents.shape, tangents.dtype),
            _workspace(logits, tangents),
        ),
        vmap_method="sequential",
        input_output_aliases={1: 0},
    )
    axes = varying(logits, tangents, labels, weights)
    products, _ = call(logits, tangents, labels, weights, **_attributes(options))
    return vary(products, axes)


def derivatives(
    logits: jax.Array, tangents: jax.Array, labels: jax.Array, weights: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Loss, log-sum-exp, gradient over the logits and products over the tangents."""
    row = jax.ShapeDtypeStruct(labels.shape, compute_dtype(logits.dtype))
    call = jax.ffi.ffi_call(
        "curvax.softmax_ce_derivatives",
        (
            jax.ShapeDtypeStruct(logits.shape, logits.dtype),
            jax.ShapeDtypeStruct(tangents.shape, tangents.dtype),
            row,
            row,
            _workspace(logits, tangents),
        ),
        vmap_method="sequential",
        input_output_aliases={0: 0, 1: 1},
    )
    axes = varying(logits, tangents, labels, weights)
    out = call(logits, tangents, labels, weights, **_attributes(options))
    grad, products, loss, lse = (vary(x, axes) for x in out[:4])
    return loss, lse, grad, products
