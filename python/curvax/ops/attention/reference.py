"""Attention by whole arrays of queries × keys, differentiated by JAX: the yardstick."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from curvax.ops.attention.options import Masks, Options, allowed
from curvax.ops.dtypes import compute_dtype

Slots = Sequence[Array]
Tangents = Sequence[Array | None]


def _value(options: Options, masks: Masks, slots: Slots) -> tuple[Array, Array, Array]:
    """The output, in the dtype of the computation, and the statistics."""
    dtype = compute_dtype(slots[0].dtype)
    query, key, value, *bias = (x.astype(dtype) for x in slots)
    heads = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, heads, axis=2) for x in (key, value))
    u = options.scale * jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    logits = options.cap(u)[0]
    if bias:
        logits = logits + bias[0]
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, *u.shape[2:]), d) for d in (2, 3))
    aligned = Masks(*(None if x is None else x[0] for x in masks.aligned()))
    may = allowed(options, aligned, rows, columns)
    if may is not None:
        logits = jnp.where(may, logits, -jnp.inf)
    shift = jax.lax.stop_gradient(jnp.max(logits, axis=3, keepdims=True, initial=-jnp.inf))
    shift = jnp.where(shift == -jnp.inf, jnp.zeros_like(shift), shift)
    weights = jnp.exp(logits - shift)
    total = jnp.sum(weights, axis=3, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total, value, precision="highest")
    log_sum = jnp.where(empty, jnp.full_like(total, jnp.inf), jnp.log(total))
    return out, shift[..., 0].mT, log_sum[..., 0].mT


def _wide(slots: Slots, like: Array) -> tuple[Array, ...]:
    return tuple(x.astype(compute_dtype(like.dtype)) for x in slots)


def _whole(slots: Slots, block: Tangents) -> tuple[Array, ...]:
    """The block in the dtype of the computation, with zeros in the place of None."""
    size = next(t.shape[0] for t in block if t is not None)
    filled = [
        jnp.zeros((size, *x.shape), x.dtype) if t is None else t
        for x, t in zip(slots, block, strict=True)
    ]
    return _wide(filled, slots[0])


def _as_wanted(parts: Slots, slots: Slots, wanted: Sequence[bool]) -> tuple[Array, ...]:
    both = zip(parts, slots, wanted, strict=True)
    return tuple(part.astype(slot.dtype) for part, slot, flag in both if flag)


def forward(options: Options, masks: Masks, slots: Slots) -> tuple[Array, Array, Array]:
    """See `tiled.forward`."""
    out, shift, log_sum = _value(options, masks, slots)
    return out.astype(slots[0].dtype), shift, log_sum


def tangents(
    options: Options, masks: Masks, slots: Slots, kept: Slots, x: Tangents
) -> tuple[Array, Array]:
    """See `tiled.tangents`."""
    wide = _wide(slots, slots[0])

    def one(*x: Array) -> tuple[Array, Array]:
        out, _, log_sum = jax.jvp(lambda *s: _value(options, masks, s), wide, x)[1]
        return out.astype(slots[0].dtype), log_sum

    return jax.vmap(one)(*_whole(slots, x))


def pullback(
    options: Options, masks: Masks, slots: Slots, kept: Slots, g: Array, wanted: Sequence[bool]
) -> tuple[Array, ...]:
    """See `tiled.pullback`."""
    wide = _wide(slots, slots[0])
    back = jax.vjp(lambda *s: _value(options, masks, s)[0], *wide)[1]
    return _as_wanted(jax.vmap(back)(g.astype(wide[0].dtype)), slots, wanted)


def curvature(
    options: Options,
    masks: Masks,
    slots: Slots,
    kept: Slots,
    upstream: Array,
    x: Tangents,
    g: Array | None,
    image: Slots,
    wanted: Sequence[bool],
) -> tuple[Array, ...]:
    """See `tiled.curvature`."""
    wide = _wide([*slots, upstream], slots[0])

    def gradient(*at: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda *s: _value(options, masks, s)[0], *at[:-1])[1](at[-1])

    def one(*t: Array) -> tuple[Array, ...]:
        return jax.jvp(gradient, wide, t)[1]

    return _as_wanted(jax.vmap(one)(*_whole([*slots, upstream], [*x, g])), slots, wanted)


def bend(
    options: Options,
    masks: Masks,
    slots: Slots,
    kept: Slots,
    x: Tangents,
    image: Slots,
    other: Tangents,
) -> Array:
    """See `tiled.bend`."""
    wide = _wide(slots, slots[0])
    second = tuple(t[0] for t in _whole(slots, [None if t is None else t[None] for t in other]))

    def one(*x: Array) -> Array:
        def along(*s: Array) -> Array:
            return jax.jvp(lambda *s: _value(options, masks, s)[0], s, x)[1]

        return jax.jvp(along, wide, second)[1].astype(slots[0].dtype)

    return jax.vmap(one)(*_whole(slots, x))
