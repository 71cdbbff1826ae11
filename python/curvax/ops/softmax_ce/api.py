"""Checks of the arguments, and choice of the implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from curvax.ops.dtypes import check_storage, compute_dtype
from curvax.ops.implementation import resolve
from curvax.ops.softmax_ce import ffi, reference
from curvax.ops.softmax_ce.options import Options

__all__ = ["derivatives", "hvp", "softmax_ce_derivatives", "softmax_ce_hvp"]


def softmax_ce_hvp(
    logits: ArrayLike,
    tangents: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> jax.Array:
    """Multiplies tangents by the Hessian of a weighted sum of cross entropies in its logits.

    For each row, with ``p = softmax(z)``, ``mu = <p, u>`` and weight ``w``, the product is
    ``w p (u - mu)``; with a softcap ``s`` it is the Hessian in the logits before the cap
    ``z = s tanh(logits / s)``, and with ``z_loss`` the loss has ``z_loss * logsumexp(z)**2`` added
    to it. Rows whose label is ``ignore_index`` or whose weight is 0 give exact zeros; rows with
    any other label outside ``[0, V)`` give NaN. Logits may be ``-inf``.

    Args:
        logits: shape ``(N, V)``; float32, float64, bfloat16 or float16.
        tangents: shape ``(N, V)`` or ``(b, N, V)``, dtype of ``logits``; donate them: the kernel
            writes the products over them.
        labels: shape ``(N,)``, int32.
        weights: shape ``(N,)``, float32 (float64 for float64 logits): each row's share in the loss.
        softcap: cap of the logits, or None.
        z_loss: factor of the squared log-sum-exp.
        label_smoothing: share of the target spread evenly over the vocabulary, in ``[0, 1]``.
        ignore_index: label of rows to leave out.
        impl: ``"auto"``, ``"ffi"`` (compiled kernel) or ``"reference"`` (plain JAX).

    Returns:
        The products, of the shape and dtype of ``tangents``.

    Raises:
        TypeError: an option is not a number, or `impl` not a string.
        ValueError: a shape or dtype is wrong, or an option out of range, also of that of the
            computation.
        RuntimeError: ``impl="ffi"`` without compiled kernels.
    """
    options = Options(softcap, z_loss, label_smoothing, ignore_index)
    return hvp(logits, tangents, labels, weights, options, impl)


def softmax_ce_derivatives(
    logits: ArrayLike,
    tangents: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Losses, log-sum-exps, gradient and Hessian products of rows of logits, in one sweep.

    The function differentiated is ``sum(weights * loss)`` with
    ``loss = lse - <t, z> + z_loss * lse**2`` and targets ``t = (1 - eps) onehot(label) + eps / V``.

    Args:
        logits: shape ``(N, V)``; float32, float64, bfloat16 or float16. Donate them: the kernel
            writes the gradient over them.
        tangents: as for :func:`softmax_ce_hvp`; ``b`` may be 0 if only the gradient is wanted.
        labels: as for :func:`softmax_ce_hvp`.
        weights: as for :func:`softmax_ce_hvp`.
        softcap: as for :func:`softmax_ce_hvp`.
        z_loss: as for :func:`softmax_ce_hvp`.
        label_smoothing: as for :func:`softmax_ce_hvp`.
        ignore_index: as for :func:`softmax_ce_hvp`.
        impl: as for :func:`softmax_ce_hvp`.

    Returns:
        ``(loss, lse, grad, hvp)``: shapes ``(N,)``, ``(N,)``, ``(N, V)`` and that of ``tangents``.
        ``loss`` and ``lse`` have the dtype of ``weights`` and are not multiplied by them; both are
        0 in ignored rows.

    Raises:
        TypeError: an option is not a number, or `impl` not a string.
        ValueError: a shape or dtype is wrong, or an option out of range, also of that of the
            computation.
        RuntimeError: ``impl="ffi"`` without compiled kernels.
    """
    options = Options(softcap, z_loss, label_smoothing, ignore_index)
    return derivatives(logits, tangents, labels, weights, options, impl)


def hvp(
    logits: ArrayLike,
    tangents: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    options: Options,
    impl: str = "auto",
) -> jax.Array:
    """`softmax_ce_hvp` with `options` that are made already."""
    arrays = _check(logits, tangents, labels, weights)
    options.check_range(arrays[3].dtype)
    module = ffi if resolve(impl, "softmax_ce_hvp") == "ffi" else reference
    return module.hvp(*arrays, options)


def derivatives(
    logits: ArrayLike,
    tangents: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    options: Options,
    impl: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`softmax_ce_derivatives` with `options` that are made already."""
    arrays = _check(logits, tangents, labels, weights)
    options.check_range(arrays[3].dtype)
    module = ffi if resolve(impl, "softmax_ce_derivatives") == "ffi" else reference
    return module.derivatives(*arrays, options)


def _check(
    logits: ArrayLike, tangents: ArrayLike, labels: ArrayLike, weights: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    z, u, y, w = (jnp.asarray(x) for x in (logits, tangents, labels, weights))

    def require(name: str, x: jax.Array, shape: str, ok: bool, dtype: jnp.dtype) -> None:
        if not ok:
            raise ValueError(f"{name} must have shape {shape}, got {x.shape}")
        if x.dtype != dtype:
            raise ValueError(f"{name} must have dtype {dtype}, got {x.dtype}")

    check_storage("logits", z.dtype)
    require("logits", z, "(N, V)", z.ndim == 2 and z.shape[1] > 0, z.dtype)
    n, v = z.shape
    shaped = u.ndim in (2, 3) and u.shape[-2:] == (n, v)
    require("tangents", u, f"({n}, {v}) or (b, {n}, {v})", shaped, z.dtype)
    require("labels", y, f"({n},)", y.shape == (n,), jnp.dtype(jnp.int32))
    require("weights", w, f"({n},)", w.shape == (n,), compute_dtype(z.dtype))
    return z, u, y, w
