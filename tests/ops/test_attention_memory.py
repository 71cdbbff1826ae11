"""Attention holds no array of queries × keys: what the compiler says, and what is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.ops.attention_problems import ours

TOKENS, HEADS, WIDTH = (1024, 2048, 4096), 2, 16


def shapes(tokens, bias):
    rows = jax.ShapeDtypeStruct((1, tokens, HEADS, WIDTH), jnp.float32)
    return (rows,) * 3 + ((jax.ShapeDtypeStruct((1, HEADS, 1, tokens), jnp.float32),) * bias)


def hvp(slots, tangents, weights):
    def f(slots):
        return jnp.vdot(ours("tiled")(*slots, is_causal=True), weights)

    return jax.jvp(jax.grad(f), (slots,), (tangents,))[1]


def reverse(slots, tangents, weights):
    def f(slots):
        return jnp.vdot(ours("tiled")(*slots, is_causal=True), weights)

    return jax.vjp(jax.grad(f), slots)[1](tangents)


def block(slots, tangents, weights):
    return jax.vmap(lambda c: hvp(slots, jax.tree.map(lambda t: c * t, tangents), weights))(
        jnp.arange(4.0)
    )


def residuals(slots, tangents, weights):
    def f(slots):
        return jnp.vdot(ours("tiled")(*slots, is_causal=True), weights)

    return jax.linearize(jax.grad(f), slots)[1]


def compiled(function, tokens, bias=False):
    slots = shapes(tokens, bias)
    return jax.jit(function).lower(slots, slots, slots[0]).compile()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("function", [hvp, reverse, block])
def test_temporary_memory_is_linear(function, bias):
    sizes = [compiled(function, t, bias).memory_analysis().temp_size_in_bytes for t in TOKENS]
    exponent = np.polyfit(np.log(TOKENS), np.log(sizes), 1)[0]
    assert exponent <= 1.05
    # Without what tiles take, which is the same for all.
    first, second = np.diff(sizes)
    assert second <= 2.1 * first


def test_what_a_linearised_product_keeps():
    """Query, key, value, output, the gradient in it, and two numbers for each row."""
    for tokens in TOKENS:
        slots = shapes(tokens, True)
        kept = jax.eval_shape(residuals, slots, slots, slots[0])
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
        rows, row = 4 * tokens * HEADS * WIDTH, 4 * tokens * HEADS
        # The bias is as long as a statistic.
        assert size <= 5 * rows + 3 * row + 64
        assert (
            compiled(residuals, tokens, True).memory_analysis().output_size_in_bytes <= size + 256
        )
