"""Scaled dot-product attention, differentiable twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer

from curvax.nn.arguments import implementation_of, masks_of, operands, options_of
from curvax.ops import attention
from curvax.ops.attention import Masks, Options
from curvax.options import takes_options
from curvax.second_order import TwiceDifferentiableMap, VectorMap
from curvax.second_order.rules import filled, there

Slots = Sequence[Array]
Tangents = Sequence[Array | None]


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static: the implementation, the options, and which masks there are."""

    impl: str
    options: Options
    present: tuple[bool, ...]

    def at(self, data: Slots) -> tuple[str, Options, Masks]:
        return self.impl, self.options, Masks(*filled(data, self.present))


def _value(spec: _Spec, slots: Slots, data: Slots) -> tuple[Array, Array, Array]:
    return attention.forward(*spec.at(data), slots)


def _tangents(
    spec: _Spec, slots: Slots, data: Slots, kept: Slots, x: Tangents
) -> tuple[Array, Array]:
    return attention.tangents(*spec.at(data), slots, kept, x)


def _pullback(
    spec: _Spec, slots: Slots, data: Slots, kept: Slots, g: Array, wanted: Sequence[bool]
) -> tuple[Array, ...]:
    return attention.pullback(*spec.at(data), slots, kept, g, wanted)


def _curvature(
    spec: _Spec,
    slots: Slots,
    data: Slots,
    kept: Slots,
    upstream: Array,
    x: Tangents,
    g: Array | None,
    image: Slots,
    wanted: Sequence[bool],
) -> tuple[Array, ...]:
    return attention.curvature(*spec.at(data), slots, kept, upstream, x, g, image, wanted)


def _bend(
    spec: _Spec, slots: Slots, data: Slots, kept: Slots, x: Tangents, image: Slots, other: Tangents
) -> Array:
    return attention.bend(*spec.at(data), slots, kept, x, image, other)


_attention = TwiceDifferentiableMap(
    VectorMap(
        name="dot_product_attention",
        remedy="jax.nn.dot_product_attention for one that has all of them",
        batched=3,
        value=_value,
        tangents=_tangents,
        pullback=_pullback,
        curvature=_curvature,
        bend=_bend,
    )
)


@takes_options()
def dot_product_attention(
    query: Float[ArrayLike, "*b t n h"],
    key: Float[ArrayLike, "*b s k h"],
    value: Float[ArrayLike, "*b s k h"],
    bias: Float[ArrayLike, ...] | None = None,
    mask: Bool[ArrayLike, ...] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[ArrayLike, " batch"] | None = None,
    key_value_seq_lengths: Integer[ArrayLike, " batch"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: Integer[ArrayLike, "*b t"] | None = None,
    key_value_segment_ids: Integer[ArrayLike, "*b s"] | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    implementation: str | None = None,
) -> Float[Array, "*b t n h"]:
    """Attention as `jax.nn.dot_product_attention` has it, with no array of queries × keys.

    Of each head, `softmax(f(scale Q Kᵀ) + bias) V` over the keys that a query may attend to, where
    `f(u) = softcap tanh(u / softcap)`, or u without a softcap. Differentiable twice in every mode
    of JAX, in query, key, value and bias, by code of its own: neither the output nor a derivative
    holds an array of T × S numbers, but that of a bias which is one, and tiles that a causal mask
    or a window leaves empty are not computed. What a linearised product keeps is query, key, value,
    output, the gradient in the output, and two numbers for each row (Dao et al. 2022,
    "FlashAttention", appendix B, differentiated once more).

    A query that may attend to nothing has the output 0, and derivatives 0; `jax.nn` gives the mean
    of the values there, unless `query_seq_lengths` says so.

    Args:
        query: shape `(B, T, N, H)` or `(T, N, H)`; float32, float64, bfloat16 or float16. Computed
            in float32, or float64 for float64.
        key: shape `(B, S, K, H)` or `(S, K, H)`, of the dtype of `query`, where K divides N: head n
            of the queries attends to head `n // (N / K)`.
        value: shape and dtype of `key`.
        bias: added to the logits, of a shape that broadcasts to `(B, N, T, S)`, a real floating
            dtype; `-inf` masks a pair.
        mask: where a query may attend to a key, bool, of a shape that broadcasts likewise.
        scale: of the products of queries and keys; None for `1 / sqrt(H)`.
        is_causal: whether query t attends to keys up to t alone.
        query_seq_lengths: shape `(B,)` integers in `[0, T]`: queries from there on attend to
            nothing. B is 1 for arrays without a batch axis.
        key_value_seq_lengths: shape `(B,)` integers in `[0, S]`: keys from there on are left out.
        local_window_size: (left, right), or one number for both: query t attends to keys from
            `t - left` to `t + right`.
        query_segment_ids: shape `(B, T)`, or `(T,)` without a batch axis, integers: a query attends
            to the keys of its own segment. Together with `key_value_segment_ids`.
        key_value_segment_ids: shape `(B, S)` or `(S,)`, integers.
        softcap: cap of the scaled products, before the bias; None for none.
        impl: `"auto"`, `"tiled"` (plain JAX, memory linear in T and S) or `"reference"` (plain JAX
            with arrays of T × S).
        implementation: the name of `impl` in `jax.nn`; give one of the two.

    Returns:
        The output, of the shape and dtype of `query`.

    Raises:
        TypeError: arrays that are not real and floating, a mask that is not bool, lengths or ids
            that are not integers, options of another type.
        ValueError: shapes or dtypes that do not match, heads that K does not divide, an option out
            of range, lengths that are known and out of range, float64 without JAX's 64-bit mode,
            an unknown or second implementation.
        NotImplementedError: on a third derivative.
    """
    impl = implementation_of(impl, implementation)
    slots = operands(query, key, value, bias)
    options = options_of(slots, scale, softcap, is_causal, local_window_size)
    batched = jnp.ndim(query) == 4
    masks = masks_of(
        slots,
        batched,
        mask,
        query_seq_lengths,
        key_value_seq_lengths,
        query_segment_ids,
        key_value_segment_ids,
    )
    if 0 in slots[0].shape or 0 in slots[1].shape:
        out = jnp.zeros_like(slots[0])
    else:
        data, present = there(masks)
        out = _attention(_Spec(impl, options, present), slots, data)
    return out if batched else out[0]
