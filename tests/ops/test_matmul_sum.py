"""Sums of matrix products, compiled and plain, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.ops.matmul_sum import matmul_sum

M, N, K = 13, 29, 37


def operand(rng, dtype, batch, rows, columns, transposed):
    shape = (columns, rows) if transposed else (rows, columns)
    return jnp.asarray(rng.standard_normal((*batch, *shape)), dtype)


def wide(x, transposed):
    x = np.asarray(x, np.float64)
    return x.swapaxes(-1, -2) if transposed else x


@pytest.mark.thin(5)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transpose_a,transpose_b", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("batches", [((), ()), ((3,), ()), ((), (3,)), ((3,), (3,))], ids=str)
def test_against_float64(batches, transpose_a, transpose_b, dtype, impl, monkeypatch):
    monkeypatch.setattr(
        "curvax.ops.matmul_sum.reference._SLICE", 60
    )  # some slices, and a ragged one
    with jax.enable_x64(dtype == "float64"):
        check(np.random.default_rng(0), batches, transpose_a, transpose_b, dtype, impl)


def check(rng, batches, transpose_a, transpose_b, dtype, impl):
    terms = [
        (
            operand(rng, dtype, batches[0], M, K, transpose_a),
            operand(rng, dtype, batches[1], K, N, transpose_b),
        )
        for _ in range(2)
    ]
    products = [(wide(a, transpose_a), wide(b, transpose_b)) for a, b in terms]
    start = jnp.asarray(rng.standard_normal((products[0][0] @ products[0][1]).shape), dtype)
    for count, add_to in [(1, None), (2, None), (1, start), (2, start)]:
        got = jax.jit(
            lambda terms, add_to: matmul_sum(
                *terms, add_to=add_to, transpose_a=transpose_a, transpose_b=transpose_b, impl=impl
            )
        )(terms[:count], add_to)
        first = 0.0 if add_to is None else np.asarray(add_to, np.float64)
        want = first + sum(a @ b for a, b in products[:count])
        scale = abs(first) + sum(abs(a) @ abs(b) for a, b in products[:count])
        assert got.shape == want.shape and got.dtype == dtype
        assert np.all(abs(got - want) <= (2 * K + 1) * np.finfo(dtype).eps * scale)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("batch", [(), (0,), (2,)], ids=str)
def test_zero_extents(batch, transpose, impl):
    """No rows, columns, terms of a sum or matrices: nothing, or what is added to."""
    for m, n, k in np.ndindex(2, 2, 2):
        a = jnp.ones((*batch, k, m) if transpose else (*batch, m, k))
        b = jnp.ones((*batch, n, k) if transpose else (*batch, k, n))
        start = jnp.full((*batch, m, n), 3.0)
        options = {"transpose_a": transpose, "transpose_b": transpose, "impl": impl}
        got = [matmul_sum((a, b), **options), matmul_sum((a, b), (a, b), add_to=start, **options)]
        assert np.array_equal(got[0], np.full((*batch, m, n), k))
        assert np.array_equal(got[1], np.full((*batch, m, n), 3 + 2 * k))


def test_the_sum_is_formed_in_place(impl):
    """The temporary memory of a donated sum is that of slices, not of a second product."""
    rows, columns = 40_000, 256
    shapes = [(128, rows), (128, columns), (rows, columns)]
    compiled = (
        jax.jit(
            lambda a, b, c: matmul_sum((a, b), add_to=c, transpose_a=True, impl=impl),
            donate_argnums=2,
        )
        .lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * rows * columns * 4


@pytest.mark.usefixtures("native_kernels")
def test_operands_that_do_not_fit_are_refused():
    a, b = jnp.ones((M, K)), jnp.ones((K + 1, N))
    with pytest.raises(Exception, match=r"curvax.matmul_sum: b must have shape \(37,29,\)"):
        matmul_sum((a, b), impl="ffi")
    with pytest.raises(Exception, match="the result must be f32 or f64"):
        matmul_sum((a.astype(jnp.bfloat16), b[:K].astype(jnp.bfloat16)), impl="ffi")
