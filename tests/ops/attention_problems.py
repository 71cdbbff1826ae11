"""Attention as a function of its slots: ours, and plain JAX in float64 for the truth."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx
from curvax.ops.dtypes import compute_dtype

EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SLOTS = ("query", "key", "value", "bias")


def make_problem(rng, batch=2, queries=9, keys=11, heads=4, of_keys=2, width=5, bias=None):
    """Slots with tangents and the weights of a loss, of numbers that every dtype has."""
    shapes = [(batch, queries, heads, width), *[(batch, keys, of_keys, width)] * 2]
    shapes += [] if bias is None else [bias]
    drawn = [rng.normal(size=s) for s in (*shapes, *shapes, shapes[0])]
    exact = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in drawn]
    count = len(shapes)
    return tuple(exact[:count]), tuple(exact[count:-1]), exact[-1]


def as_dtype(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def truth(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    softcap=None,
):
    """In the dtype of the arrays, unlike `jax.nn`, whose softmax is in float32."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    s = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    s = s * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    s = s if bias is None else s + bias
    t, u = np.arange(s.shape[2])[:, None], np.arange(s.shape[3])[None]
    may = np.ones(s.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask), s.shape)
    if is_causal:
        may = may & (u <= t)
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        may = may & (u >= t - left) & (u <= t + right)
    if query_seq_lengths is not None:
        may = may & (t < np.asarray(query_seq_lengths)[:, None, None, None])
    if key_value_seq_lengths is not None:
        may = may & (u < np.asarray(key_value_seq_lengths)[:, None, None, None])
    if query_segment_ids is not None:
        ids = np.asarray(query_segment_ids)[:, None, :, None]
        may = may & (ids == np.asarray(key_value_segment_ids)[:, None, None, :])
    some = may.any(axis=3, keepdims=True)
    s = jnp.where(may | ~some, s, -jnp.inf)
    p = jnp.where(some, jax.nn.softmax(s, axis=3), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", p, value, precision="highest")


def loss(attention, weights, options=None):
    """A loss whose gradient in the output depends on the output."""

    def total(slots):
        out = attention(*slots, **(options or {}))
        wide = compute_dtype(out.dtype)
        return jnp.sum(jnp.sin(out.astype(wide)) * weights.astype(wide))

    return total


def ours(impl):
    return functools.partial(cx.nn.dot_product_attention, impl=impl)


def derivatives(attention, options=None):
    """Output, gradient and Hessian product, of slots, tangents and weights."""

    def all_of_them(slots, tangents, weights):
        out = attention(*slots, **(options or {}))
        f = loss(attention, weights, options)
        return out, *jax.jvp(jax.grad(f), (slots,), (tangents,))

    return jax.jit(all_of_them)


def true_derivatives(problem, options=None):
    with jax.enable_x64(True):
        found = derivatives(truth, options)(*as_dtype(problem, jnp.float64))
        return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def assert_close(got, want, tolerance):
    """Every array within `tolerance` of its largest entry, or of a tenth of the largest of all.

    What is zero, as the gradient in the query where there is one key, has no scale of its own.
    """
    got, want = (jax.tree.leaves(x) for x in (got, want))
    assert [x.shape for x in got] == [x.shape for x in want]
    largest = [np.abs(x).max() for x in want]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        scale = max(largest[i], max(largest) / 10)
        error = np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() / scale
        assert error <= tolerance, f"array {i}: error {error:.1e} of {tolerance:.1e}"
