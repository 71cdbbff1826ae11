"""The kernels on a CUDA device against float64: sizes that only a device can take, graphs, repeats.

The rest of what they do is tested without a device: tests/native runs them on an emulation,
tests/ops on the default device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.ops.test_softmax_ce import EPS, assert_close, problem, truth

from curvax import _native
from curvax.ops.block_ortho import orthonormalize_block, rotate_basis
from curvax.ops.softmax_ce import softmax_ce_derivatives, softmax_ce_hvp

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1}])
@pytest.mark.parametrize("vocab", [7, 301, 60001])
@pytest.mark.parametrize("dtype", EPS)
def test_small_softmax_ce(dtype, vocab, options, rng):
    with jax.enable_x64(dtype == "float64"):
        arguments = problem(rng, dtype, rows=3, vocab=vocab)
        got = softmax_ce_derivatives(*arguments, **options, impl="ffi")
    names = ("loss", "lse", "grad", "hvp")
    assert_close(got, truth(*arguments, **options), dtype, names)


def orthonormal(rng, rows, n):
    return np.linalg.qr(rng.normal(size=(n, rows)))[0].T


TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 1e-2, "float16": 1e-3}


@pytest.mark.parametrize(
    ("used", "b", "n"), [(0, 1, 17), (9, 3, 1001), (33, 8, 5000), (70, 2, 777)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_small_block_ortho(dtype, used, b, n, rng):
    q = np.full((used + b + 2, n), np.nan)
    q[:used] = orthonormal(rng, used, n) if used else 0
    w = rng.normal(size=(b, n)) + rng.normal(size=(b, used)) @ q[:used]
    with jax.enable_x64(True):
        basis = jnp.asarray(q, dtype)
        stored = np.asarray(basis[:used], np.float64)
        block = jnp.asarray(w, "float64" if dtype == "float64" else "float32")
        got, c, s, info = orthonormalize_block(basis, block, np.int32(used), 0, impl="ffi")
    new = np.asarray(got[used : used + b], np.float64)
    assert np.abs(new @ new.T - np.eye(b)).max() <= TOLERANCE[dtype]
    assert used == 0 or np.abs(new @ stored.T).max() <= TOLERANCE[dtype]
    assert np.isnan(np.asarray(got[used + b :], np.float64)).all()
    rest = np.asarray(c)[:used].T @ stored + np.asarray(s).T @ new - np.asarray(block, np.float64)
    norms = np.linalg.norm(w, axis=1)
    assert (np.linalg.norm(rest, axis=1) <= 4 * TOLERANCE[dtype] * norms).all(), info


@pytest.mark.parametrize(("used", "kept", "n"), [(5, 5, 33), (40, 17, 1000)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_small_rotation(dtype, used, kept, n, rng):
    rotation = np.eye(used + 3)
    rotation[:used, :used] = orthonormal(rng, used, used)
    with jax.enable_x64(True):
        basis = jnp.asarray(rng.normal(size=(used + 3, n)), dtype)
        got = rotate_basis(basis, rotation, np.int32(used), np.int32(kept), impl="ffi")
    want = np.array(basis, np.float64)
    want[:kept] = rotation[:used, :kept].T @ want[:used]
    eps = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10}[dtype]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=16 * eps)


def steps(basis, blocks):
    """Several blocks, one after the other, with what a restart does in between."""

    def step(carry, block):
        q, used = carry
        q, c, _, _ = orthonormalize_block(q, block, used, 1, impl="ffi")
        return (q, used + block.shape[0]), c

    (basis, used), c = jax.lax.scan(step, (basis, jnp.int32(0)), blocks)
    rotation = jnp.eye(basis.shape[0], dtype=jnp.float64)[::-1]
    return rotate_basis(basis, rotation, used, used, impl="ffi"), c


def test_the_same_bits_every_time_with_and_without_graphs(rng, tmp_path):
    n, b, count = 300_001, 3, 8
    blocks = jnp.asarray(rng.normal(size=(count, b, n)), jnp.float32)
    basis = jnp.zeros((count * b, n), jnp.float32)
    # The loop has fewer calls than XLA makes a graph for of itself.
    graphs = {"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)}
    with jax.enable_x64(True):
        lowered = jax.jit(steps).lower(basis, blocks)
        results = []
        for options in (graphs, {}, {"xla_gpu_enable_command_buffer": ""}):
            compiled = lowered.compile(compiler_options=options)
            results += [compiled(basis, blocks) for _ in range(2)]
        first = [np.asarray(x).tobytes() for x in results[0]]
        for other in results[1:]:
            assert [np.asarray(x).tobytes() for x in other] == first
    q = np.asarray(results[0][0], np.float64)
    assert np.abs(q @ q.T - np.eye(len(q))).max() <= 1e-6
    dumped = "".join(path.read_text() for path in tmp_path.glob("*thunk_sequence*.txt"))
    assert "kCommandBuffer" in dumped or _native.platform() != "cuda"


@pytest.mark.parametrize("vocab", [50257, 151936])
def test_products_of_long_rows_repeat_to_the_bit(vocab, rng):
    z = jnp.asarray(3 * rng.normal(size=(64, vocab)), jnp.float32)
    u = jnp.asarray(rng.normal(size=(2, 64, vocab)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocab, 64), jnp.int32)
    weights = jnp.ones(64, jnp.float32)
    call = jax.jit(lambda *a: softmax_ce_hvp(*a, impl="ffi"))
    first = np.asarray(call(z, u, labels, weights))
    for _ in range(3):
        assert np.asarray(call(z, u, labels, weights)).tobytes() == first.tobytes()
    p = np.exp(np.asarray(z, np.float64) - np.asarray(z).max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    v = np.asarray(u, np.float64)
    want = p * (v - (p * v).sum(-1, keepdims=True))
    assert np.abs(first - want).max() <= 16 * EPS["float32"] * np.abs(want).max()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(rng):
    n, vocab = 42700, 50304
    rows = np.asarray(rng.normal(size=(2, vocab)), jnp.bfloat16)
    z, u = (jnp.broadcast_to(jnp.asarray(row), (n, vocab)).copy() for row in rows)
    want = rows[:1].astype(np.float64), rows[1:].astype(np.float64)
    labels, weights = jnp.zeros(n, jnp.int32), jnp.ones(n, jnp.float32)
    call = jax.jit(lambda *a: softmax_ce_hvp(*a, impl="ffi"), donate_argnums=1)
    got = np.asarray(call(z, u, labels, weights)[-2:], np.float64)
    p = np.exp(want[0] - want[0].max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    products = p * (want[1] - (p * want[1]).sum(1, keepdims=True))
    np.testing.assert_allclose(got, np.repeat(products, 2, 0), rtol=2**-7, atol=1e-8)
