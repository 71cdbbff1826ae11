"""Inner products of stored rows, compiled and plain, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.columns import CHUNK
from curvax.ops.inner_products import Rows, inner_products, residual_products, row_products

N = CHUNK + 1234
# Sums of 66,770 terms, relative to those of their sizes.
TOLERANCE = 1e-14


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def stored(rng, rows, dtype, scale=1.0):
    """A matrix with NaN where no row is meant, of which the rows from the second on are."""
    x = np.full((rows + 3, N + 6), np.nan)
    x[2 : 2 + rows, :N] = rng.standard_normal((rows, N)) * scale
    return Rows(jnp.asarray(x, dtype), jnp.int32(2), rows, scale)


def vectors(rows):
    start = int(rows.start)
    picked = np.asarray(rows.stored)[start : start + rows.number, :N].astype(np.float64)
    return picked / rows.scale


def check(got, left, right):
    """`got` is `left @ right.T` with the errors of a sum in float64."""
    assert got.dtype == np.float64
    assert np.all(abs(np.asarray(got) - left @ right.T) <= TOLERANCE * (abs(left) @ abs(right).T))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_all_products_of_two_sets(dtype, impl, rng):
    a, b = stored(rng, 3, dtype, 64.0), stored(rng, 5, "float32")
    call = jax.jit(
        lambda x, y: inner_products(a._replace(stored=x), b._replace(stored=y), N, impl=impl)
    )
    check(call(a.stored, b.stored), vectors(a), vectors(b))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_gram_matrix_is_symmetric_to_the_last_bit(dtype, impl, rng):
    a = stored(rng, 6, dtype, 0.25)
    gram = np.asarray(inner_products(a, None, N, impl=impl))
    check(gram, vectors(a), vectors(a))
    assert np.array_equal(gram, gram.T)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_products_of_pairs(dtype, impl, rng):
    sets = [stored(rng, 2, "float32"), stored(rng, 1, dtype, 4.0), stored(rng, 2, dtype, 8.0)]
    rows = np.concatenate([vectors(x) for x in sets])
    pairs = [(0, 0), (1, 4), (3, 2), (3, 3)]
    got = row_products(sets, pairs, N, impl=impl)
    for value, (i, j) in zip(got, pairs, strict=True):
        check(value, rows[i], rows[j])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_sums_of_residuals(dtype, impl, rng):
    """Of rows 2 and 3 of a basis, and a coupling with rows 4 and 5."""
    basis = stored(rng, 4, dtype, 16.0)
    x, q = vectors(basis)[:2], vectors(basis)[2:]
    w = rng.standard_normal((2, N)).astype("float64" if dtype == "float64" else "float32")
    shifts, thetas, coupling = np.array([0.3, 2.0]), np.array([0.5, -1.0]), np.ones((2, 2)) / 3
    given = jnp.int32(4), jnp.asarray(w), *(jnp.asarray(a) for a in (shifts, thetas, coupling))
    got = np.asarray(residual_products(basis._replace(number=2), *given, impl=impl))
    rest, error = w - shifts[:, None] * x, w - thetas[:, None] * x - coupling.T @ q
    for k, (u, v) in enumerate([(x, x), (x, rest), (rest, rest), (error, error)]):
        for i in range(2):
            check(got[i, k], u[i], v[i])


def test_no_copy_of_the_rows_is_made(native_kernels, rng):
    """Neither a wide one nor one of the rows that are meant."""
    a = stored(rng, 4, "bfloat16")
    call = jax.jit(lambda x: inner_products(a._replace(stored=x), None, N, impl="ffi"))
    assert call.lower(a.stored).compile().memory_analysis().temp_size_in_bytes < 1000


def test_several_at_once_by_vmap(impl, rng):
    x = jnp.asarray(rng.standard_normal((3, 2, 50)), jnp.float32)
    got = jax.vmap(lambda rows: inner_products(Rows.all_of(rows), None, 50, impl=impl))(x)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(got, wide @ wide.swapaxes(1, 2), rtol=1e-13)


def test_what_is_refused(native_kernels):
    x = Rows.all_of(jnp.ones((3, 8), jnp.float32))
    with pytest.raises(ValueError, match=r"set 0 of the rows must be float32.*got dtype int32"):
        inner_products(Rows.all_of(jnp.ones((3, 8), jnp.int32)), None, 8)
    with pytest.raises(ValueError, match=r"set 1 must be at least one row.*n = 9.*got 3 rows"):
        inner_products(Rows.all_of(jnp.ones((3, 9), jnp.float32)), x, 9)
    with pytest.raises(ValueError, match=r"set 0 must be .*got 4 rows of shape \(3, 8\)"):
        inner_products(x._replace(number=4), None, 8)
    with pytest.raises(ValueError, match="sets must be one to 3 sets of rows, got 4"):
        row_products([x] * 4, [(0, 0)], 8)
    with pytest.raises(ValueError, match="products must be 3 rows in float32.*2 rows in float64"):
        residual_products(x, x.start, jnp.ones((2, 8)), jnp.ones(3), jnp.ones(3), jnp.ones((3, 3)))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"3 rows from 1 on must be rows of .*3,8"):
        jax.block_until_ready(inner_products(x._replace(start=jnp.int32(1)), None, 8, impl="ffi"))
    with jax.enable_x64(False), pytest.raises(ValueError, match="under jax.enable_x64"):
        inner_products(x, None, 8)
