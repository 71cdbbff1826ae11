"""Lowerings with torch's derivatives where a function has a kink, or a tie to break.

JAX's differ there: 1/2 of `clip` at a bound, 1 of `abs` at 0, shares among equal maxima. Zeros of
padding and of ReLU make such places common.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.typing import ArrayLike

from curvax.adapters.torch.tensor_distances import absolute, root
from curvax.adapters.torch.tensor_registry import Lowering, Register
from curvax.typing import PyTree


def register_kinks(torchax: ModuleType, register: Register) -> None:
    """Give the lowerings.

    Args:
        torchax: the module.
        register: takes a lowering.
    """
    aten, lowered = torch.ops.aten, torchax.ops.jaten
    register(aten.abs, absolute)
    register(aten.clamp, _clamp)
    register(aten.clamp_min, lambda x, low: _clamp(x, low))
    register(aten.clamp_max, lambda x, high: _clamp(x, None, high))
    register(aten.hardtanh, _hardtanh)
    register(aten.hardsigmoid, lambda x: _hardtanh(x + 3, 0, 6) / 6)
    register(aten.leaky_relu, lambda x, slope=0.01: jnp.where(x > 0, x, x * slope))
    register(aten.log_sigmoid_forward, lambda x: (jax.nn.log_sigmoid(x), x[:0]))
    register(aten.sinc, jnp.sinc)
    for operation, place in ((aten.max.dim, jnp.argmax), (aten.min.dim, jnp.argmin)):
        register(operation, _extreme(place))
    for operation, former in (
        (aten.cummax, lowered._aten_cummax),
        (aten.cummin, lowered._aten_cummin),
    ):
        register(operation, _running(former))
    for form in ("default", "dim", "correction"):
        register(getattr(aten.std, form), _std(form))
        register(getattr(aten.std_mean, form), _std(form, mean=True))
    register(aten.hardswish, _hardswish)
    register(aten.multilabel_margin_loss_forward, _multilabel_margin)
    register(aten.binary_cross_entropy, _binary_cross_entropy)
    register(aten.smooth_l1_loss, _bent(lambda z, beta: z * z / (2 * beta), lambda beta: 1.0))
    register(aten.huber_loss, _bent(lambda z, delta: z * z / 2, lambda delta: delta))


def _clamp(x: jax.Array, low: ArrayLike | None = None, high: ArrayLike | None = None) -> jax.Array:
    kind = jnp.result_type(x, *(bound for bound in (low, high) if bound is not None))
    x = x.astype(kind)
    if low is not None:
        x = jnp.where(x < low, jnp.asarray(low, kind), x)
    return x if high is None else jnp.where(x > high, jnp.asarray(high, kind), x)


def _hardtanh(x: jax.Array, low: ArrayLike = -1, high: ArrayLike = 1) -> jax.Array:
    inside = jnp.where(x <= low, jnp.asarray(low, x.dtype), x)
    return jnp.where(inside >= high, jnp.asarray(high, x.dtype), inside)


def _extreme(place: Callable[..., jax.Array]) -> Lowering:
    def lowering(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
        if x.ndim == 0:
            return x, jnp.zeros((), jnp.int64)
        where = place(x, axis=dim, keepdims=True).astype(jnp.int64)
        values = jnp.take_along_axis(x, where, axis=dim)
        return (values, where) if keepdim else (values.squeeze(dim), where.squeeze(dim))

    return lowering


def _running(former: Callable[..., tuple[jax.Array, jax.Array]]) -> Lowering:
    def lowering(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
        if x.ndim == 0:
            return x, jnp.zeros((), jnp.int64)
        where = former(jax.lax.stop_gradient(x), dim % x.ndim)[1]
        return jnp.take_along_axis(x, where, axis=dim), where.astype(jnp.int64)

    return lowering


def _std(form: str, mean: bool = False) -> Lowering:
    def lowering(x: jax.Array, *args: Any, **kwargs: Any) -> PyTree:
        if form == "default":
            dim, correction, keepdim = None, int(args[0] if args else 1), False
        elif form == "dim":
            names = dict(zip(("dim", "unbiased", "keepdim"), args, strict=False)) | kwargs
            dim, keepdim = names["dim"], names.get("keepdim", False)
            correction = int(names.get("unbiased", True))
        else:
            dim = args[0] if args else kwargs.get("dim")
            given = kwargs.get("correction")
            correction, keepdim = 1 if given is None else given, kwargs.get("keepdim", False)
        axes = tuple(dim) if isinstance(dim, (list, tuple)) else dim
        axes = None if axes == () else axes
        out = root(jnp.var(x, axis=axes, ddof=correction, keepdims=keepdim), 2)
        return (out, jnp.mean(x, axis=axes, keepdims=keepdim)) if mean else out

    return lowering


def _binary_cross_entropy(
    x: jax.Array, target: jax.Array, weight: jax.Array | None = None, reduction: int = 1
) -> jax.Array:
    """With torch's slope where the probability has become 0 or 1: that of a denominator 1e-12."""
    least = 1e-12
    inside = x * (1 - x) > least
    safe = jnp.where(inside, x, 0.5)
    smooth = -(target * jnp.log(safe) + (1 - target) * jnp.log1p(-safe))
    at = jax.lax.stop_gradient(x)
    value = -(
        target * jnp.maximum(jnp.log(at), -100) + (1 - target) * jnp.maximum(jnp.log1p(-at), -100)
    )
    step = x - at
    edge = value + (step * (at - target) + step * step / 2) / least
    losses = jnp.where(inside, smooth, edge)
    losses = losses if weight is None else losses * weight
    return [lambda: losses, losses.mean, losses.sum][reduction]()


def _hardswish(x: jax.Array) -> jax.Array:
    return jnp.where(x <= -3, jnp.zeros((), x.dtype), jnp.where(x < 3, x * (x + 3) / 6, x))


def _bent(
    inner: Callable[[jax.Array, float], jax.Array], slope: Callable[[float], float]
) -> Lowering:
    """A loss that is a square near 0 and grows by `slope` far from it."""

    def lowering(
        x: jax.Array, target: jax.Array, reduction: int = 1, width: float = 1.0
    ) -> jax.Array:
        z = x - target
        size = absolute(z)
        outer = slope(width) * (size - width / 2)
        losses = jnp.where(size < width, inner(z, width), outer) if width else size
        return [lambda: losses, losses.mean, losses.sum][reduction]()

    return lowering


def _multilabel_margin(
    x: jax.Array, target: jax.Array, reduction: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Of the labels of a row those before the first -1 count."""
    rows, labels = jnp.atleast_2d(x), jnp.atleast_2d(target)
    counted = jnp.cumprod(labels >= 0, axis=1).astype(bool)
    chosen = jnp.take_along_axis(rows, jnp.where(counted, labels, 0), axis=1)
    classes = jnp.arange(rows.shape[1])
    wanted = (counted[:, :, None] & (labels[:, :, None] == classes)).any(1)
    gaps = 1 - chosen[:, :, None] + rows[:, None]
    pairs = counted[:, :, None] & ~wanted[:, None] & (gaps > 0)
    losses = jnp.where(pairs, gaps, 0).sum((1, 2)) / rows.shape[1]
    losses = losses if x.ndim > 1 else losses[0]
    return [lambda: losses, losses.mean, losses.sum][reduction](), wanted.astype(x.dtype)
