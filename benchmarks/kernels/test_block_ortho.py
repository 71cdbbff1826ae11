"""A full orthogonalisation (two passes, Gram and normalisation) against the best of three in jnp.

`W @ Q.T` and `Q @ W.T` behind optimisation barriers differ by an order of magnitude in XLA:CPU, and
a loop over the rows lies between: the kernel is compared with the fastest. The jnp versions only
return the new block; the kernel writes it into the basis. All sides donate what they can.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.lib.interleaved import SMOKE, medians
from jax import lax

from curvax import _native
from curvax.ops.block_ortho.arguments import Arguments
from curvax.ops.block_ortho.ffi import call_block_ortho

assert _native.available()  # which registers the kernels: `call_block_ortho` takes it for granted

USED, LENGTH = (16, 20_000) if SMOKE else (64, 2_000_000)
dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
barrier = lax.optimization_barrier


def normalised(w):
    gram = barrier(dot(w, w.T))
    inverse = jax.scipy.linalg.solve_triangular(
        jnp.linalg.cholesky(gram), jnp.eye(w.shape[0], dtype=w.dtype), lower=True
    )
    return barrier(dot(inverse, w))


def block_first(w, q):
    """CGS2 with the coefficients from `W @ Q.T`."""
    for _ in range(2):
        w = normalised(w - dot(dot(w, q.T), q))
    return w


def basis_first(w, q):
    """CGS2 with the coefficients from `Q @ W.T`, which XLA must not transpose back."""
    for _ in range(2):
        h = barrier(dot(q, barrier(w).T))
        w = normalised(barrier(w - dot(h.T, q)))
    return w


def row_loop(w, q):
    """Modified Gram-Schmidt over the rows of the basis, twice."""

    def step(i, w):
        row = lax.dynamic_index_in_dim(q, i % USED, 0)
        return w - dot(w, row.T) * row  # ten times faster here than a sum of products

    w = lax.fori_loop(0, 2 * USED, step, w)
    return normalised(normalised(w))


def orthonormal_basis(used, n):
    q = jax.random.normal(jax.random.key(0), (used, n), jnp.float32)
    return jax.jit(lambda q: normalised(normalised(q)), donate_argnums=0)(q)


@pytest.mark.parametrize("b", [1, 4, 8])
def test_orthonormalise_block(benchmark, b):
    q = orthonormal_basis(USED, LENGTH)
    full = jnp.concatenate([q, jnp.zeros((b, LENGTH))])
    block = jax.random.normal(jax.random.key(1), (b, LENGTH)) + 500 * q[:1]
    fresh = jax.jit(lambda x: x + 0)
    seed = jnp.zeros(2, jnp.uint32)
    kernel = jax.jit(
        lambda basis, w: call_block_ortho(Arguments(basis, w, jnp.int32(USED), seed, 1.0, 0.0)),
        donate_argnums=(0, 1),
    )
    state = {"basis": full, "block": block + 0}
    restore = jax.jit(lambda old, new: new + 0 * old, donate_argnums=0)

    def prepare_kernel():
        state["block"] = restore(state["block"], block)
        return state["block"]

    def run_kernel(w):
        state["basis"], state["block"], *small = kernel(state["basis"], w)
        return state["basis"], small

    _, (_, _, info) = run_kernel(prepare_kernel())
    new = np.asarray(state["basis"][USED:], np.float64)
    gram = np.asarray(dot(state["basis"][USED:], q.T), np.float64)
    assert np.abs(gram).max() <= 1e-6 and np.abs(new @ new.T - np.eye(b)).max() <= 1e-6
    assert np.asarray(info)[0] == 2

    total = jax.jit(jnp.sum)
    ways = {"sum": ((lambda: None), lambda _: total(q)), "kernel": (prepare_kernel, run_kernel)}
    for way in (block_first, basis_first, row_loop):
        call = jax.jit(way, donate_argnums=0)
        ways[way.__name__] = ((lambda: fresh(block)), functools.partial(_apply, call, q))
    seconds = medians(ways, rounds=3 if SMOKE else 7)
    best = min(seconds[way.__name__] for way in (block_first, basis_first, row_loop))
    benchmark.extra_info.update(
        seconds=seconds,
        ratios={
            f"block_ortho b={b}: best jnp / kernel": best / seconds["kernel"],
            f"block_ortho b={b}: kernel / sum(Q)": seconds["kernel"] / seconds["sum"],
        },
    )
    benchmark.pedantic(run_kernel, setup=lambda: ((prepare_kernel(),), {}), rounds=3)


def _apply(call, q, w):
    return call(w, q)


def test_storage_types(benchmark):
    """Twelve rows of each type, by three reads of them: the shape of a language model's solve."""
    used, n = (12, 20_000) if SMOKE else (12, 10_000_000)
    rows = jnp.concatenate([orthonormal_basis(used, n), jnp.zeros((1, n))])
    block = jax.random.normal(jax.random.key(1), (1, n)) + n**0.5 * rows[:1]
    restore = jax.jit(lambda old, new: new + 0 * old, donate_argnums=0)
    kernel = jax.jit(
        lambda basis, w: call_block_ortho(
            Arguments(basis, w, jnp.int32(used), jnp.zeros(2, jnp.uint32), 1.0, 0.0)
        ),
        donate_argnums=(0, 1),
    )
    state = {"block": block + 0}

    def prepare():
        state["block"] = restore(state["block"], block)
        return state["block"]

    def run(dtype, w):
        state[dtype], state["block"], *small = kernel(state[dtype], w)
        return state[dtype], small

    total = jax.jit(jnp.sum)
    ways = {"sum": ((lambda: None), lambda _: total(rows))}
    for dtype in ("float32", "float16", "bfloat16"):
        state[dtype] = jnp.array(rows, dtype, copy=True)
        _, (_, _, info) = run(dtype, prepare())
        assert np.asarray(info)[0] == 2
        ways[dtype] = prepare, functools.partial(run, dtype)
    seconds = medians(ways, rounds=3 if SMOKE else 7)
    share = 3 * used / (used + 1) * seconds["sum"] / seconds["float32"]
    benchmark.extra_info.update(
        seconds=seconds,
        ratios={
            "block_ortho float32: bandwidth / that of sum": share,
            "block_ortho: float32 / float16": seconds["float32"] / seconds["float16"],
            "block_ortho: float32 / bfloat16": seconds["float32"] / seconds["bfloat16"],
        },
    )
    benchmark.pedantic(lambda w: run("float16", w), setup=lambda: ((prepare(),), {}), rounds=3)
