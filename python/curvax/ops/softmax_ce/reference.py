"""The same in plain JAX, for any platform and as the yardstick of the kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax.ops.dtypes import compute_dtype
from curvax.ops.softmax_ce.options import Options


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Terms of the loss, each of shape (N, V) or (N, 1)."""

    z: jax.Array  # logits after the cap
    slope: jax.Array | None  # dz / dlogits, None without a cap
    lse: jax.Array
    p: jax.Array
    kappa: jax.Array  # 1 + 2 zeta lse
    target: jax.Array
    weight: jax.Array  # NaN where the label names no class
    ignored: jax.Array


def cap(logits: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """The capped logits and the cap's slope; the logits themselves and None without a cap."""
    if softcap is None:
        return logits, None
    capped = softcap * jnp.tanh(logits / softcap)
    return capped, 1 - (capped / softcap) ** 2


def _rows(logits: jax.Array, labels: jax.Array, weights: jax.Array, options: Options) -> _Rows:
    dtype = compute_dtype(logits.dtype)
    z, slope = cap(logits.astype(dtype), options.softcap)
    vocab = z.shape[1]
    lse = jax.nn.logsumexp(z, axis=1, keepdims=True)
    onehot = jax.nn.one_hot(labels, vocab, dtype=dtype)
    smoothing = options.label_smoothing
    invalid = (labels < 0) | (labels >= vocab)
    return _Rows(
        z=z,
        slope=slope,
        lse=lse,
        p=jnp.exp(z - lse),
        kappa=1 + 2 * options.z_loss * lse,
        target=(1 - smoothing) * onehot + smoothing / vocab,
        weight=jnp.where(invalid, jnp.nan, weights)[:, None],
        ignored=(labels == options.ignore_index)[:, None],
    )


def _gradient(rows: _Rows) -> jax.Array:
    return rows.weight * (rows.kappa * rows.p - rows.target)


def _products(rows: _Rows, tangents: jax.Array, options: Options) -> jax.Array:
    def one(u: jax.Array) -> jax.Array:
        zd = u.astype(rows.z.dtype)
        if rows.slope is not None:
            zd = rows.slope * zd
        mu = jnp.sum(rows.p * zd, axis=1, keepdims=True)
        out = rows.weight * rows.p * (rows.kappa * (zd - mu) + 2 * options.z_loss * mu)
        if rows.slope is not None and options.softcap is not None:
            curvature = 2 / options.softcap**2 * rows.z
            out = rows.slope * out - curvature * zd * _gradient(rows)
        return out.astype(u.dtype)

    return one(tangents) if tangents.ndim == 2 else jax.vmap(one)(tangents)


def _losses(rows: _Rows, labels: jax.Array, options: Options) -> jax.Array:
    smoothing, vocab = options.label_smoothing, rows.z.shape[1]
    # The label's logit by an index: 0 * -inf in a product with the target would be NaN.
    index = jnp.clip(labels, 0, vocab - 1)[:, None]
    loss = rows.lse - (1 - smoothing) * jnp.take_along_axis(rows.z, index, axis=1)
    loss = loss + options.z_loss * rows.lse**2
    if smoothing > 0:
        loss = loss - smoothing / vocab * jnp.sum(rows.z, axis=1, keepdims=True)
    loss = jnp.where((labels < 0) | (labels >= vocab), jnp.nan, loss[:, 0])
    return jnp.where(rows.ignored[:, 0], jnp.zeros_like(loss), loss)


def losses(logits: jax.Array, labels: jax.Array, weights: jax.Array, options: Options) -> jax.Array:
    """The loss of each row, `(N,)`, not weighted; 0 in ignored rows."""
    return _losses(_rows(logits, labels, weights, options), labels, options)


def _clear(rows: jax.Array, x: jax.Array) -> jax.Array:
    mask = jnp.broadcast_to(rows, x.shape[-2:])
    return jnp.where(jnp.broadcast_to(mask, x.shape), jnp.zeros((), x.dtype), x)


def hvp(
    logits: jax.Array, tangents: jax.Array, labels: jax.Array, weights: jax.Array, options: Options
) -> jax.Array:
    """Hessian products; see `api.softmax_ce_hvp`."""
    rows = _rows(logits, labels, weights, options)
    return _clear(rows.ignored | (weights == 0)[:, None], _products(rows, tangents, options))


def derivatives(
    logits: jax.Array, tangents: jax.Array, labels: jax.Array, weights: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Loss, log-sum-exp, gradient and products; see `api.softmax_ce_derivatives`."""
    rows = _rows(logits, labels, weights, options)
    loss = _losses(rows, labels, options)
    grad = _gradient(rows) if rows.slope is None else rows.slope * _gradient(rows)
    ignored = rows.ignored[:, 0]
    return (
        loss,
        jnp.where(ignored, jnp.zeros_like(loss), rows.lse[:, 0]),
        _clear(rows.ignored, grad.astype(logits.dtype)),
        _clear(rows.ignored, _products(rows, tangents, options)),
    )
