"""Inner products of stored rows, compiled and plain, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.columns import CHUNK
from curvax.ops.inner_products import Rows, inner_products, row_products

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
def test_products_of_pairs_and_of_combinations(dtype, impl, rng):
    sets = [stored(rng, 2, "float32"), stored(rng, 1, dtype, 4.0), stored(rng, 2, dtype, 4.0)]
    rows = np.concatenate([vectors(x) for x in sets])
    pairs = [(0, 0), (1, 4), (3, 2)]
    got = np.asarray(row_products(sets, pairs, N, impl=impl))
    for value, (i, j) in zip(got, pairs, strict=True):
        check(value, rows[i], rows[j])

    weights = rng.standard_normal((5, 5))
    weights[2] = 0, 1, 0, 0, -3
    got = np.asarray(row_products(sets, pairs, N, jnp.asarray(weights), impl=impl))
    combined, sizes = weights @ rows, abs(weights) @ abs(rows)
    for value, (i, j) in zip(got, pairs, strict=True):
        assert abs(value - combined[i] @ combined[j]) <= TOLERANCE * (sizes[i] @ sizes[j])


def test_zeros_are_left_out_of_combinations_by_the_kernel(native_kernels, rng):
    rows = Rows.all_of(jnp.asarray([[1.0, 2.0], [np.nan, 1.0], [3.0, 3.0]]))
    weights = jnp.asarray([[1.0, 0.0, 1.0]])
    assert row_products([rows], [(0, 0)], 2, weights, impl="ffi")[0] == 16 + 25


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
    with pytest.raises(
        ValueError, match=r"coefficients must have shape \(combinations, 3\).*\(2,\)"
    ):
        row_products([x], [(0, 0)], 8, jnp.ones(2))
    with pytest.raises(ValueError, match="coefficients must be float64, got float32"):
        row_products([x], [(0, 0)], 8, jnp.ones((2, 3), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"3 rows from 1 on must be rows of .*3,8"):
        jax.block_until_ready(inner_products(x._replace(start=jnp.int32(1)), None, 8, impl="ffi"))
    with jax.enable_x64(False), pytest.raises(ValueError, match="under jax.enable_x64"):
        inner_products(x, None, 8)
