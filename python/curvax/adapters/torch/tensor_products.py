"""Functions of torch that torchax lacks or computes otherwise than torch, written in JAX.

Plain operations only, so that derivatives of any order and mode and `vmap` go through.
"""

import math

import jax
import jax.numpy as jnp
import torch
from jax import Array

from curvax.adapters.torch.tensor_registry import Register


def register_products(take: Register) -> None:
    """Give the functions of this file.

    Args:
        take: takes a lowering.
    """
    for function, ours in (
        (torch.nn.functional.linear, linear),
        (torch.nn.functional.grouped_mm, grouped_mm),
        (torch.ops.aten._grouped_mm, grouped_mm),
        (torch.nn.functional.scaled_dot_product_attention, attention),
        (torch.ops.aten.scaled_dot_product_attention, attention),
    ):
        take(function, ours)


def linear(input: Array, weight: Array, bias: Array | None = None) -> Array:
    """`torch.nn.functional.linear`, by torch's names of its arguments.

    Args:
        input: `(..., i)`.
        weight: `(o, i)`, or `(i,)`.
        bias: `(o,)`.

    Returns:
        `(..., o)`.
    """
    product = jnp.matmul(input, weight.T)
    return product if bias is None else product + bias


def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """See `torch.nn.functional.scaled_dot_product_attention`.

    A query that sees no key gives zeros, and its derivatives are zeros.

    Raises:
        ValueError: dropout.
    """
    if dropout_p > 0:
        raise ValueError(
            "scaled_dot_product_attention must compute the same in every call, got "
            f"dropout_p={dropout_p}: pass 0 in evaluation, as by `p if self.training else 0.0`"
        )
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (jnp.repeat(x, repeats, -3) for x in (key, value))
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = jnp.matmul(query.astype(dtype) * factor, jnp.swapaxes(key.astype(dtype), -2, -1))
    if is_causal:
        attn_mask = jnp.tri(scores.shape[-2], scores.shape[-1], dtype=bool)
    if attn_mask is not None and attn_mask.dtype == bool:
        scores = jnp.where(attn_mask, scores, -jnp.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.astype(dtype)
    return jnp.matmul(_softmax(scores), value.astype(dtype)).astype(query.dtype)


def _softmax(scores: Array) -> Array:
    """Along the last axis; zeros where all scores are -inf, as torch 2.5 and later have it."""
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    powers = jnp.exp(scores - jnp.where(jnp.isneginf(largest), 0, largest))
    total = powers.sum(-1, keepdims=True)
    return powers / jnp.where(total == 0, 1, total)


def grouped_mm(
    a: Array,
    b: Array,
    offs: Array | None = None,
    bias: Array | None = None,
    out_dtype: torch.dtype | None = None,
) -> Array:
    """See `torch.nn.functional.grouped_mm`; rows of no group are zeros.

    The groups are cut into blocks of equally many rows, the last of each filled up with zeros, and
    the blocks multiplied in a batch. So many rows that there are at most twice as many blocks as
    groups: at most twice the work of the groups alone, where a mask for each group costs as many
    times the work as there are groups. `jax.lax.ragged_dot` has no `vmap` over tangents.

    Raises:
        NotImplementedError: a bias, which torch 2.13 does not take either.
    """
    if bias is not None:
        raise NotImplementedError("grouped_mm with a bias")
    dtype = a.dtype if out_dtype is None else jnp.dtype(str(out_dtype).removeprefix("torch."))
    if offs is None:
        out = jnp.matmul(a, b)
    elif a.ndim == 2 and b.ndim == 3:
        out = _rows_by_groups(a, b, offs)
    elif a.ndim == 3 and b.ndim == 2:
        out = _rows_by_groups(b.T, jnp.swapaxes(a, 1, 2), offs).T
    else:
        out = _groups_of_both(a.T, b, offs)
    return out.astype(dtype)


def _rows_by_groups(rows: Array, matrices: Array, ends: Array) -> Array:
    """Each row (m, k) times the matrix (g, k, n) of its group: (m, n)."""
    blocks = _Blocks(rows.shape[0], ends)
    return blocks.rows(jnp.matmul(blocks.of(rows), matrices[blocks.group]))


def _groups_of_both(left: Array, right: Array, ends: Array) -> Array:
    """`left[group].T @ right[group]` of the rows (k, m) and (k, n) of each group: (g, m, n)."""
    blocks = _Blocks(left.shape[0], ends)
    products = jnp.matmul(jnp.swapaxes(blocks.of(left), 1, 2), blocks.of(right))
    return jax.ops.segment_sum(products, blocks.group, ends.shape[0], indices_are_sorted=True)


class _Blocks:
    """Rows in groups, cut into blocks.

    Attributes:
        group: of each block; of a block without rows any.
    """

    def __init__(self, count: int, ends: Array) -> None:
        groups = ends.shape[0]
        self.size = max(1, -(-count // groups))
        ends = jnp.clip(ends, 0, count)
        self.starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        needed = (ends - self.starts + self.size - 1) // self.size
        behind = jnp.cumsum(needed)
        self.first = behind - needed
        block = jnp.arange(count // self.size + groups)
        self.group = jnp.minimum(jnp.searchsorted(behind, block, side="right"), groups - 1)
        begin = self.starts[self.group] + (block - self.first[self.group]) * self.size
        index = begin[:, None] + jnp.arange(self.size)
        self.index = jnp.where(index < ends[self.group][:, None], index, count)
        row = jnp.arange(count)
        self.group_of_row = jnp.searchsorted(ends, row, side="right")

    def of(self, rows: Array) -> Array:
        """The blocks (blocks, size, ...) of rows."""
        return rows.at[self.index].get(mode="fill", fill_value=0)

    def rows(self, blocks: Array) -> Array:
        """The rows of blocks; zeros those of no group."""
        groups = self.starts.shape[0]
        group = jnp.minimum(self.group_of_row, groups - 1)
        place = jnp.arange(self.group_of_row.shape[0]) - self.starts[group]
        found = blocks[self.first[group] + place // self.size, place % self.size]
        return jnp.where((self.group_of_row < groups)[:, None], found, 0)
