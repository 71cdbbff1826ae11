"""The losses as functions of arrays."""

from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import ArrayLike

from curvax.arrays import to_array
from curvax.losses.checks import (
    chunk_rows,
    counted_rows,
    elementwise_weights,
    floating,
    head_operands,
    mean_of,
)
from curvax.losses.linear_ce import LinearSpec, linear_ce_total
from curvax.losses.softmax_ce import Spec, softmax_ce_total
from curvax.ops.dtypes import compute_dtype
from curvax.ops.softmax_ce import Options
from curvax.options import takes_options


@takes_options()
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_weight: bool = False,
) -> Any:
    """Mean softmax cross entropy, in nats, of logits that are given.

    Per label, with `lse = logsumexp(z)`: `lse - <t, z> + z_loss * lse**2`, where `t` puts
    `1 - label_smoothing` on the label and spreads the rest evenly. Differentiable twice in every
    mode of JAX; the Hessian product, `w p (u - <p, u>)` (Schraudolph 2002, "Fast curvature
    matrix-vector products", section 3), reads the logits and the tangent once, and writes over the
    tangent.

    Args:
        logits: shape `(..., V)`, a real floating dtype; `-inf` masks a class. Computed in float32,
            or float64 for float64.
        labels: shape `(...)`, integers.
        weights: each label's share in the mean, shape `(...)`, or None for equal shares. Not
            negative, as that of one that counts; where that is not known yet, under `jit`, the
            result is NaN. Not differentiated.
        ignore_index: label of what is left out.
        label_smoothing: share of the target that is spread over the vocabulary, in `[0, 1]`.
        z_loss: factor of `lse**2` (de Brébisson and Vincent 2016).
        softcap: cap `s` of the logits, `z = s tanh(logits / s)`; None for none.
        return_weight: also return the sum of the weights of the labels counted.

    Returns:
        The mean, a scalar of dtype float32 (float64 for float64 logits), or `(mean, weight)`.

    Raises:
        TypeError: labels that are not integers, logits that are not real and floating; on
            differentiation, weights that depend on what is differentiated.
        ValueError: shapes that do not match, an option out of range, or, where the labels are
            known, a label outside `[0, V)` or none to count (unless `return_weight`); a weight
            that is known and negative, infinite or NaN.
        NotImplementedError: on a third derivative.
    """
    options = Options(softcap, z_loss, label_smoothing, ignore_index)
    z = floating("logits", logits)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., V) with V > 0, got {z.shape}")
    rows = counted_rows(
        z.shape, labels, weights, options, compute_dtype(z.dtype), return_weight, "logits"
    )
    narrow = jnp.float32 if z.dtype == jnp.float16 else z.dtype
    flat = z.astype(narrow).reshape(-1, z.shape[-1])
    mean = mean_of(softmax_ce_total(Spec(options), (flat,), (rows.labels, rows.shares)), rows)
    return (mean, rows.weight) if return_weight else mean


@takes_options()
def linear_cross_entropy(
    hidden: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | Literal["auto"] = "auto",
    return_weight: bool = False,
) -> Any:
    """Mean softmax cross entropy of `hidden @ head.T + bias`, without an array of logits.

    On a device the products with the head are in the precision of `jax_default_matmul_precision`,
    as `hidden @ head.T` would be; on a CPU in that of the operands.

    The value, gradient and Hessian products go over chunks of tokens by the whole vocabulary, so
    that memory is bounded by `chunk * V` and the arithmetic is that of the plain form.

    Args:
        hidden: shape `(..., D)`, a real floating dtype.
        head: shape `(V, D)`, a real floating dtype.
        labels: shape `(...)`, integers.
        bias: shape `(V,)`, or None.
        weights: as for :func:`softmax_cross_entropy`, and so are `ignore_index`,
            `label_smoothing`, `z_loss`, `softcap` and `return_weight`.
        ignore_index: see above.
        label_smoothing: see above.
        z_loss: see above.
        softcap: see above.
        chunk: tokens whose logits exist at once; `"auto"` takes 256, or as many as keep the
            logits and their tangents within 0.5 GB (on a device 2048, and 2 GB).
        return_weight: see above.

    Returns:
        As for :func:`softmax_cross_entropy`.

    Raises:
        TypeError: as for :func:`softmax_cross_entropy`, or a `chunk` that is neither an
            integer nor a string.
        ValueError: as for :func:`softmax_cross_entropy`, a head whose width is not that of
            `hidden`, `chunk` below 1 or a string other than `"auto"`.
        NotImplementedError: on a third derivative.
    """
    options = Options(softcap, z_loss, label_smoothing, ignore_index)
    slots = head_operands(hidden, head, bias)
    dtype = compute_dtype(jnp.result_type(*slots))
    shape = (*slots[0].shape[:-1], slots[1].shape[0])
    rows = counted_rows(shape, labels, weights, options, dtype, return_weight, "hidden")
    flat = slots[0].reshape(-1, slots[0].shape[-1])
    spec = LinearSpec(options, chunk=chunk_rows(chunk))
    mean = mean_of(linear_ce_total(spec, (flat, *slots[1:]), (rows.labels, rows.shares)), rows)
    return (mean, rows.weight) if return_weight else mean


@takes_options()
def mse(
    outputs: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    return_weight: bool = False,
) -> Any:
    """Mean squared error over all elements: `sum(w (outputs - targets)**2) / sum(w)`.

    Args:
        outputs: any shape, a real floating dtype.
        targets: the same shape.
        weights: each element's share in the mean; its shape is that of `outputs` or its leading
            axes, as `(B,)` for samples. None for equal shares. Not negative, as for
            :func:`softmax_cross_entropy`.
        return_weight: also return the sum of the weights, over all elements.

    Returns:
        The mean, a scalar of the dtype of `outputs` (at least float32), or `(mean, weight)`.

    Raises:
        TypeError: not real and floating.
        ValueError: shapes that do not match, or a weight that is known and negative, infinite or
            NaN.
    """
    x = floating("outputs", outputs)
    dtype = compute_dtype(x.dtype)
    scaled, total, weight = elementwise_weights(x, weights, dtype)
    y = to_array(targets, "targets")
    if y.shape != x.shape:
        raise ValueError(f"targets must have the shape of outputs, {x.shape}, got {y.shape}")
    residual = x.astype(dtype) - y.astype(dtype)
    mean = jnp.sum(scaled * residual * residual) / total
    return (mean, weight) if return_weight else mean
