"""The three sums of products of a language model's head against XLA's own products.

A chunk of 256 tokens, width 256, 50,304 classes. XLA gets the shorter way for each sum: two
products and an addition, or one product of operands that are already side by side.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from benchmarks.lib.interleaved import SMOKE, medians

from curvax import _native
from curvax.ops.matmul_sum import matmul_sum

assert _native.available()

ROWS, WIDTH, VOCAB = (16, 32, 500) if SMOKE else (256, 256, 50304)
HIDDEN, HEAD, LOGITS = (ROWS, WIDTH), (VOCAB, WIDTH), (ROWS, VOCAB)
# Shapes of a and b, which of the two is transposed, and the axis of k in each.
SUMS = {
    "logits": (HIDDEN, HEAD, {"transpose_b": True}, (1, 1)),
    "hidden": (LOGITS, HEAD, {}, (1, 0)),
    "head": (LOGITS, HIDDEN, {"transpose_a": True}, (0, 0)),
}


@pytest.mark.parametrize("name", SUMS)
def test_sum_of_two_products(benchmark, name):
    a_shape, b_shape, transposed, axes = SUMS[name]
    keys = jax.random.split(jax.random.key(0), 4)
    a, c = (jax.random.normal(key, a_shape) for key in keys[:2])
    b, d = (jax.random.normal(key, b_shape) for key in keys[2:])
    joined = [jnp.concatenate(x, axis) for x, axis in zip([(a, c), (b, d)], axes, strict=True)]

    kernel = jax.jit(lambda a, b, c, d: matmul_sum((a, b), (c, d), impl="ffi", **transposed))
    product = jax.jit(functools.partial(jax.lax.dot_general, dimension_numbers=_contract(axes)))
    two = jax.jit(lambda a, b, c, d: product(a, b) + product(c, d))
    got, want = kernel(a, b, c, d), two(a, b, c, d)
    assert jnp.max(jnp.abs(got - want)) <= 1e-5 * jnp.max(jnp.abs(want))

    ways = {
        "kernel": functools.partial(kernel, a, b, c, d),
        "two products": functools.partial(two, a, b, c, d),
        "one product": functools.partial(product, *joined),
    }
    seconds = medians(
        {way: ((lambda: None), lambda _, call=call: call()) for way, call in ways.items()},
        rounds=3 if SMOKE else 9,
    )
    best = min(seconds["two products"], seconds["one product"])
    benchmark.extra_info.update(
        seconds=seconds,
        ratios={f"matmul_sum {name}: best XLA / kernel": best / seconds["kernel"]},
    )
    benchmark.pedantic(ways["kernel"], rounds=3)


def _contract(axes):
    return (((axes[0],), (axes[1],)), ((), ()))
