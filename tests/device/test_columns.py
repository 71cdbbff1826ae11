"""Loops over columns: wide steps on a device, the same vectors of a seed everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import columns
from curvax import program as compiled
from curvax.columns import CHUNK, over_columns, random_columns
from curvax.device import probes, programs
from curvax.operators import products

N = 5 * CHUNK + 37


@pytest.fixture
def on_device(monkeypatch):
    """As where JAX's default device is no CPU, with steps of four times those of a CPU."""

    def switch():
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(columns, "_WIDE_CHUNK", 4 * CHUNK)
        monkeypatch.setenv("CURVAX_IMPL", "reference")
        compiled._cache.clear()

    yield switch
    compiled._cache.clear()


def steps(n, rows):
    """The columns of each step, as traced: the loop's, and those after it."""
    seen = []

    def visit(carry, first, width):
        seen.append(width)
        return carry + first.astype(carry.dtype)

    jax.make_jaxpr(lambda x: over_columns(visit, x, n, rows=rows))(jnp.zeros((), jnp.int32))
    return seen


def test_steps_are_wide_on_a_device_alone(monkeypatch):
    n = 10**8
    assert steps(n, 1) == steps(n, 1000) == [CHUNK, n % CHUNK]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert steps(n, 1) == [1 << 22, n % (1 << 22)]
    for rows in (8, 12, 64, 500, 10**6):
        (width, rest) = steps(n, rows)
        assert rest == n % width and width & (width - 1) == 0 and width >= CHUNK
        assert 8 * rows * width <= 1 << 28 or width == CHUNK
        assert 8 * rows * width > 1 << 27 or width == 1 << 22


@pytest.mark.parametrize("width", [CHUNK, 2 * CHUNK, 3 * CHUNK + 5, 17])
def test_random_columns_do_not_depend_on_the_width(width):
    key = jax.random.key(3, impl="threefry2x32")

    def draw(own, width):
        return jax.random.normal(own, (2, width))

    got = random_columns(draw, key, jnp.int32(CHUNK), width)
    for first in range(0, width, CHUNK):
        short = min(CHUNK, width - first)
        want = draw(jax.random.fold_in(key, CHUNK + first), short)
        assert np.array_equal(got[:, first : first + short], want)


@pytest.mark.parametrize("b", [1, 3])
def test_a_random_block_is_that_of_its_chunks_however_many_are_drawn_at_once(b):
    n = 11 * CHUNK + 37
    op = cx.from_matvec(lambda v: v, n)
    like = jnp.zeros((b, 0))
    got = programs.random_block(compiled.Clock(), op, like, np.uint32(1), np.uint32(2))
    key = jax.random.fold_in(jax.random.key(1, impl="threefry2x32"), 2)
    draw = jax.jit(jax.random.normal, static_argnums=1)
    for first in range(0, n, CHUNK):
        width = min(CHUNK, n - first)
        want = draw(jax.random.fold_in(key, first), (b, width))
        assert np.array_equal(got[:, first : first + width], want)


def test_a_seed_draws_the_same_vectors_on_a_device(on_device):
    op = cx.from_matvec(lambda v: v, N)
    like, clock = jnp.zeros((2, N)), compiled.Clock()

    def drawn():
        block = programs.random_block(clock, op, like, np.uint32(1), np.int32(2))
        signs = probes.draw(clock, op, like, 1, 0, "rademacher")
        return np.asarray(block), np.asarray(signs)

    on_cpu = drawn()
    on_device()
    for x, y in zip(drawn(), on_cpu, strict=True):
        assert np.array_equal(x, y)


@pytest.mark.slow
def test_a_solve_and_an_estimate_are_those_of_a_cpu(on_device):
    """To rounding: sums over columns are in another order."""
    values = np.append([9.0, -8.0], np.linspace(-2, 2, N - 2)).astype(np.float32)
    op = cx.from_matvec(lambda v: jnp.asarray(values) * v, N)

    def run():
        pairs = cx.eigsh(op, 2, seed=0, max_basis=12)
        trace = cx.trace(op, method="xtrace", num_matvecs=8, seed=0)
        return pairs, trace

    pairs, trace = run()
    on_device()
    wide_pairs, wide_trace = run()
    np.testing.assert_allclose(wide_pairs.eigenvalues, [9, -8], rtol=1e-6)
    np.testing.assert_allclose(wide_pairs.residuals, pairs.residuals, rtol=0.1, atol=1e-5)
    assert wide_pairs.orthogonality < 1e-6
    np.testing.assert_allclose(wide_trace.estimate, trace.estimate, rtol=1e-5)
    np.testing.assert_allclose(wide_trace.samples, trace.samples, rtol=1e-4)


def test_sums_over_samples_are_short_on_a_device_too(on_device):
    """Of products of float32: the error is that of sums over a CPU's steps."""
    rng = np.random.default_rng(0)
    x, v = (rng.uniform(1, 2, size=(k, N)).astype(np.float32) for k in (3, 2))
    on_device()
    text = jax.jit(products._inner).lower(x, v).as_text()
    assert f"x4x{CHUNK}xf32" in text
    wide = v.astype(np.float64) @ x.astype(np.float64).T
    np.testing.assert_allclose(jax.jit(products._inner)(x, v), wide, rtol=2e-6)
