"""softmax_ce_hvp against jitted `z + u` (its memory traffic) and the jitted jnp formula.

All sides donate `u`: at these sizes the page faults of a fresh output would decide.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.lib.interleaved import SMOKE, medians

from curvax.ops.softmax_ce import softmax_ce_hvp

SHAPES = [(16, 1009), (8, 4001)] if SMOKE else [(512, 50257), (128, 151936)]


def formula(z, u, weights):
    p = jax.nn.softmax(z, axis=1)
    return weights[:, None] * p * (u - jnp.sum(p * u, axis=1, keepdims=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_hessian_product(benchmark, shape):
    rows, vocab = shape
    keys = jax.random.split(jax.random.key(0), 2)
    z, u = (jax.random.normal(key, shape, jnp.float32) for key in keys)
    labels, weights = jnp.zeros(rows, jnp.int32), jnp.full(rows, 1 / rows)
    calls = {
        "add": jax.jit(lambda u, z: z + u, donate_argnums=0),
        "formula": jax.jit(lambda u, z: formula(z, u, weights), donate_argnums=0),
        "kernel": jax.jit(
            lambda u, z: softmax_ce_hvp(z, u, labels, weights, impl="ffi"), donate_argnums=0
        ),
    }

    exact = formula(np.asarray(z[:2], np.float64), np.asarray(u[:2], np.float64), weights[:2])
    got = calls["kernel"](u + 0, z)[:2]
    assert np.abs(got - np.asarray(exact)).max() <= 1e-5 * np.abs(np.asarray(exact)).max()

    # Each way works in its own memory, and starts from the same tangents: products of products
    # would soon be subnormal.
    arrays = {name: u + 0 for name in calls}
    restore = jax.jit(lambda old, new: new + 0 * old, donate_argnums=0)

    def way(name):
        def prepare():
            arrays[name] = restore(arrays[name], u)
            return arrays[name]

        def run(operand):
            arrays[name] = calls[name](operand, z)
            return arrays[name]

        return prepare, run

    seconds = medians({name: way(name) for name in calls})
    benchmark.extra_info.update(
        seconds=seconds,
        ratios={
            f"softmax_ce_hvp {shape}: time / (z + u)": seconds["kernel"] / seconds["add"],
            f"softmax_ce_hvp {shape}: jnp / kernel": seconds["formula"] / seconds["kernel"],
        },
    )
    prepare, run = way("kernel")
    benchmark.pedantic(run, setup=lambda: ((prepare(),), {}), rounds=3)
