"""Attention by tiles, in plain JAX: no array of queries × keys, and no tile that is empty.

Of a row of the logits S, with weights P = softmax(S), two statistics are kept: the shift m, its
largest, and the logarithm of `l = sum(exp(S - m))`. Then `P = exp(S - m - log l)`, exact for logits
so large that m + log l would be m. A row that attends to nothing has m = 0 and log l = ∞, so P = 0.

With u = scale Q Kᵀ, S = f(u) + B and O = P V, for an upstream gradient G of O (Dao et al. 2022,
"FlashAttention", appendix B, differentiated once more):

    D  = rowsum(G ∘ O)            dP = G Vᵀ             dS = P ∘ (dP - D)        dU = f' dS
    dV = Pᵀ G     dQ = scale dU K     dK = scale dUᵀ Q     dB = dS

and for tangents q, k, v, b, g, sharing P, dP and dS among the tangents of a block:

    u̇  = scale (q Kᵀ + Q kᵀ)      s = f' u̇ + b          μ = rowsum(P ∘ s)       p = P ∘ (s - μ)
    o  = (P ∘ s) V - μ O + P v    d = rowsum(g ∘ O + G ∘ o)
    ds = P ∘ ((s - μ) ∘ (dP - D) + g Vᵀ + G vᵀ - d)       du = f' ds + f'' u̇ dS
    dv = pᵀ G + Pᵀ g     dq = scale (du K + dU k)     dk = scale (duᵀ Q + dUᵀ q)     db = ds

`slots` are query `(B, T, N, H)`, key and value `(B, S, K, H)` and, if there is one, the bias
`(B, N, T, S)`, of which any axis may be 1. `kept` is the output and the statistics, `(B, T, N)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from curvax.ops.attention import products
from curvax.ops.attention.options import Masks, Options
from curvax.ops.attention.problem import (
    BIAS,
    KEY,
    QUERY,
    VALUE,
    Problem,
    Slots,
    Sums,
    Tangents,
    Tiles,
    Weights,
)
from curvax.ops.attention.tiles import Place
from curvax.typing import PyTree


def forward(options: Options, masks: Masks, slots: Slots) -> tuple[Array, Array, Array]:
    """The output, of the shape and dtype of the query, and the shift and log-sum of each row.

    By tiles of keys, what was added up before scaled to the largest logit so far (Milakov and
    Gimelshein 2018, "Online normalizer calculation for softmax").
    """
    p = Problem.of(options, masks, slots)
    out = p.padded_rows(slots[0][None])

    def row(at: Place, results: list[Array]) -> list[Array]:
        own = p(QUERY, at)

        def tile(at: Place, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, mean = state
            logits, _, _ = p.logits(own, at)
            new = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
            base = jnp.where(new == -jnp.inf, jnp.zeros_like(new), new)
            weights, fade = jnp.exp(logits - base), jnp.exp(top - base)
            total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
            return new, total, mean * fade + products.rows(weights, p(VALUE, at))

        narrow = p.zeros(*own.shape[:-1], 1)
        start = (narrow - jnp.inf, narrow, p.zeros(*own.shape))
        top, total, mean = p.grid.over_columns(at, tile, start)
        empty = total == 0
        found = (
            mean / jnp.where(empty, jnp.ones_like(total), total),
            jnp.where(empty, jnp.zeros_like(top), top),
            jnp.where(empty, jnp.full_like(total, jnp.inf), jnp.log(total)),
        )
        return [p.put(x, y, at) for x, y in zip(results, found, strict=True)]

    narrow = (*out.shape[:-1], 1)
    results = p.grid.over_rows(row, [p.zeros(*shape) for shape in (out.shape, narrow, narrow)])
    out, shift, log_sum = (p.grid.trimmed(x, "rows")[0] for x in results)
    return out.astype(slots[0].dtype), shift[..., 0], log_sum[..., 0]


def _logit_tangents(
    p: Problem, weights: Weights, x: Tiles, query: Array, at: Place
) -> tuple[Array | None, Array | None]:
    """The tangents of u and of S; None of zero."""
    u = products.sum_of_pairs((x(QUERY, at), p(KEY, at)), (query, x(KEY, at)))
    s = products.total(None if u is None else weights.before(u), x(BIAS, at))
    return u, s


def tangents(
    options: Options, masks: Masks, slots: Slots, kept: Slots, x: Tangents
) -> tuple[Array, Array]:
    """The tangents `(b, B, T, N, H)` of the output and `(b, B, T, N)` of the log-sum: o and μ.

    `x` has a block, or None for zero, for each slot.
    """
    block = _size(x)
    p = Problem.of(options, masks, slots, block, kept)
    along, out = p.tangents(x), p.padded_rows(kept[0][None])

    def row(at: Place, results: list[Array]) -> list[Array]:
        rows = p.rows(at)

        def tile(at: Place, state: tuple[Array, Array]) -> tuple[Array, Array]:
            mean, total = state
            weights = p.weights(rows, at)
            _, s = _logit_tangents(p, weights, along, rows.query, at)
            if s is not None:
                weighted = weights.p * s
                mean = mean + jnp.sum(weighted, axis=-1, keepdims=True)
                total = total + products.rows(weighted, p(VALUE, at))
            own = along(VALUE, at)
            return mean, total if own is None else total + products.rows(weights.p, own)

        b, k, _, *rest, width = rows.query.shape
        start = (p.zeros(b, k, block, *rest, 1), p.zeros(b, k, block, *rest, width))
        mean, total = p.grid.over_columns(at, tile, start)
        found = (total - mean * p.cut(out, at), mean)
        return [p.put(y, z, at) for y, z in zip(results, found, strict=True)]

    wide = (block, *out.shape[1:])
    results = p.grid.over_rows(row, [p.zeros(*wide), p.zeros(*wide[:-1], 1)])
    o, mean = (p.grid.trimmed(y, "rows") for y in results)
    return o.astype(slots[0].dtype), mean[..., 0]


def pullback(
    options: Options, masks: Masks, slots: Slots, kept: Slots, g: Array, wanted: Sequence[bool]
) -> tuple[Array, ...]:
    """The gradients for a block g `(b, B, T, N, H)` of upstream gradients, in the slots wanted."""
    block = g.shape[0]
    p = Problem.of(options, masks, slots, block, kept)
    sums = Sums(p, slots, wanted, block)
    along, dots = p.padded_rows(g), p.padded_rows(_row_dots(p, (g, kept[0][None])))

    def row(at: Place, parts: list[Array | None]) -> list[Array | None]:
        rows, upstream, dot = p.rows(at), p.cut(along, at), p.cut(dots, at)

        def tile(at: Place, state: PyTree) -> PyTree:
            dq, parts = state
            weights = p.weights(rows, at)
            ds = weights.p * (products.pairs(upstream, p(VALUE, at)) - dot)
            du = weights.before(ds)
            if wanted[QUERY]:
                dq = dq + products.rows(du, p(KEY, at))
            if wanted[KEY]:
                parts = sums.add(parts, KEY, products.columns(du, rows.query), at)
            if wanted[VALUE]:
                parts = sums.add(parts, VALUE, products.columns(weights.p, upstream), at)
            return dq, sums.add(parts, BIAS, ds, at)

        dq, parts = p.grid.over_columns(at, tile, (p.zeros(*upstream.shape), parts))
        return sums.add(parts, QUERY, options.scale * dq, at)

    return sums.finish(p.grid.over_rows(row, sums.start))


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
    """The tangents of the gradients in the slots wanted, along blocks x and g.

    Args:
        options: constants.
        masks: what may be attended to.
        slots: query, key, value, and the bias if there is one.
        kept: of `forward`.
        upstream: the gradient G in the output.
        x: a block for each slot, or None for zero; not all are None.
        g: a block of tangents of `upstream`, or None.
        image: of `tangents` along x.
        wanted: one for each slot.
    """
    block = _size(x)
    p = Problem.of(options, masks, slots, block, kept)
    sums, along = Sums(p, slots, wanted, block), p.tangents(x)
    own, own_g = p.padded_rows(upstream[None]), None if g is None else p.padded_rows(g)
    out, mean = kept[0][None], p.padded_rows(image[1])
    dots = p.padded_rows(_row_dots(p, (upstream[None], out)))
    terms = ((upstream[None], image[0]), *(() if g is None else ((g, out),)))
    dot_tangents = p.padded_rows(_row_dots(p, *terms))

    def row(at: Place, parts: list[Array | None]) -> list[Array | None]:
        rows, upstream = p.rows(at), p.cut(own, at)
        tangent = None if own_g is None else p.cut(own_g, at)
        dot, dot_tangent, mu = p.cut(dots, at), p.cut(dot_tangents, at), p.cut(mean, at)
        query = along(QUERY, at)

        def tile(at: Place, state: PyTree) -> PyTree:
            dq, parts = state
            weights, k, v = p.weights(rows, at), p(KEY, at), p(VALUE, at)
            k_tangent, v_tangent = along(KEY, at), along(VALUE, at)
            u, s = _logit_tangents(p, weights, along, rows.query, at)
            rise = products.pairs(upstream, v) - dot
            steep = products.total(
                None if s is None else (s - mu) * rise,
                products.sum_of_pairs((tangent, v), (upstream, v_tangent)),
            )
            ds = weights.p * ((-dot_tangent) if steep is None else steep - dot_tangent)
            # Of the first order, which the tangents of the query and the key multiply.
            first = weights.before(weights.p * rise)
            du = weights.before(ds)
            if weights.bend is not None and u is not None:
                du = du + weights.bend * u * (weights.p * rise)
            if wanted[QUERY]:
                dq = dq + products.rows(du, k)
                if k_tangent is not None:
                    dq = dq + products.rows(first, k_tangent)
            if wanted[KEY]:
                both = _columns((du, rows.query), (first, query))
                parts = sums.add(parts, KEY, both, at)
            if wanted[VALUE]:
                p_tangent = None if s is None else weights.p * (s - mu)
                both = _columns((p_tangent, upstream), (weights.p, tangent))
                parts = sums.add(parts, VALUE, both, at)
            return dq, sums.add(parts, BIAS, ds, at)

        b, k, _, *rest = rows.query.shape
        dq, parts = p.grid.over_columns(at, tile, (p.zeros(b, k, block, *rest), parts))
        return sums.add(parts, QUERY, options.scale * dq, at)

    return sums.finish(p.grid.over_rows(row, sums.start))


def bend(
    options: Options,
    masks: Masks,
    slots: Slots,
    kept: Slots,
    x: Tangents,
    image: Slots,
    other: Tangents,
) -> Array:
    """The second derivative of the output along each of a block x and along one tangent.

    With x' that tangent, a = s - μ, and w = a ∘ s' + f' ü + f'' u̇ ∘ u̇', where
    `ü = scale (q k'ᵀ + q' kᵀ)`, it is

        (P ∘ w) V + (P ∘ a) v' + (P ∘ s') v - rowsum(P ∘ s') o - rowsum(P ∘ w) O
    """
    block = _size(x)
    p = Problem.of(options, masks, slots, block, kept)
    along, second = p.tangents(x), p.tangents([None if t is None else t[None] for t in other])
    out, o, mean = (p.padded_rows(y) for y in (kept[0][None], *image))

    def row(at: Place, result: Array) -> Array:
        rows, mu = p.rows(at), p.cut(mean, at)
        queries = along(QUERY, at), second(QUERY, at)

        def tile(at: Place, state: tuple[Array, ...]) -> tuple[Array, ...]:
            weights, value = p.weights(rows, at), p(VALUE, at)
            u, s = _logit_tangents(p, weights, along, rows.query, at)
            u_other, s_other = _logit_tangents(p, weights, second, rows.query, at)
            u_both = products.sum_of_pairs(
                (queries[0], second(KEY, at)), (queries[1], along(KEY, at))
            )
            centred = None if s is None else s - mu
            w = products.total(
                None if u_both is None else weights.before(u_both),
                None if centred is None or s_other is None else centred * s_other,
                None
                if weights.bend is None or u is None or u_other is None
                else weights.bend * u * u_other,
            )
            terms = ((w, value), (centred, second(VALUE, at)), (s_other, along(VALUE, at)))
            total = state[0]
            for factor, columns in terms:
                if factor is not None and columns is not None:
                    total = total + products.rows(weights.p * factor, columns)
            sums = (
                y if t is None else y + jnp.sum(weights.p * t, axis=-1, keepdims=True)
                for y, t in zip(state[1:], (s_other, w), strict=True)
            )
            return (total, *sums)

        b, k, _, *rest, width = rows.query.shape
        start = [p.zeros(b, k, n, *rest, d) for n, d in ((block, width), (1, 1), (block, 1))]
        total, mean_other, mean_both = p.grid.over_columns(at, tile, tuple(start))
        found = total - mean_other * p.cut(o, at) - mean_both * p.cut(out, at)
        return p.put(result, found, at)

    result = p.grid.over_rows(row, p.zeros(block, *out.shape[1:]))
    return p.grid.trimmed(result, "rows").astype(slots[0].dtype)


def _columns(*terms: tuple[Array | None, Array | None]) -> Array | None:
    return products.total(
        *(products.columns(a, b) for a, b in terms if a is not None and b is not None)
    )


def _size(x: Tangents) -> int:
    return next(t.shape[0] for t in x if t is not None)


def _row_dots(p: Problem, *terms: tuple[Array, Array]) -> Array:
    """`sum(a * b)` over the last axis, added up over the terms."""
    dtype = p.slots.dtype
    (first, *rest) = (jnp.sum(a.astype(dtype) * b.astype(dtype), axis=-1) for a, b in terms)
    return sum(rest, first)
