"""The inner_products kernels against exact sums, at every CPU target of this machine."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

native = pytest.importorskip("curvax_native_tests")

STORAGE = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# One element, ragged vectors, panels and chunks, and many chunks of several panels.
LENGTHS = [1, 7, 63, 64, 65, 1023, 5000, 70_001]


def bits(x):
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def products(target, threads, sets, n, runs):
    runs = np.asarray(runs, np.int64)
    out = np.full(runs[:, 2].sum(), 7.0)
    sets = [(dtype, bits(rows)) for dtype, rows in sets]
    native.inner_products(target, threads, sets, n, runs, out)
    return out


def padded(rows, dtype, spare=5):
    """Rows in storage, with NaN behind the elements that are meant."""
    out = np.full((len(rows), rows.shape[1] + spare), np.nan)
    out[:, : rows.shape[1]] = rows
    return out.astype(STORAGE[dtype])


def integers(rng, rows, n):
    """Small enough for every storage type, and for sums of products in float64 without rounding."""
    return rng.integers(-100, 101, (rows, n)).astype(np.float64)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_sums_of_integers_are_exact(cpu_target, dtype, n):
    """All products of six rows with themselves and with five others: runs of one to eleven."""
    rng = np.random.default_rng(n)
    a, b = integers(rng, 6, n), integers(rng, 5, n)
    rows = np.concatenate([a, b])
    sets = [(dtype, padded(a, dtype)), ("float32", padded(b, "float32"))]
    runs = [(i, i, 11 - i) for i in range(11)]
    got = products(cpu_target, 2, sets, n, runs)
    assert np.array_equal(got, (rows @ rows.T)[np.triu_indices(11)])


def residual_products(target, threads, dtype, x, w, q, shifts, thetas, coupling):
    """Of x and q in storage, alike padded, and w in the type that is computed in."""
    w = w.astype(np.float64 if dtype == "float64" else np.float32)
    out = np.full((len(w), 4), 7.0)
    small = (np.asarray(a, np.float64) for a in (shifts, thetas, coupling))
    native.residual_products(target, threads, dtype, bits(x), w, bits(q), *small, out)
    return out


@pytest.mark.parametrize("b", [1, 2, 5])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_residuals_of_integers_are_exact(cpu_target, dtype, n, b):
    rng = np.random.default_rng(n)
    x, w, q = (integers(rng, b, n) for _ in range(3))
    shifts, thetas = rng.integers(-9, 10, (2, b))
    coupling = rng.integers(-9, 10, (b, b)) * (rng.random((b, b)) < 0.7)
    given = padded(x, dtype), w, padded(q, dtype), shifts, thetas, coupling
    got = residual_products(cpu_target, 2, dtype, *given)
    rest, error = w - shifts[:, None] * x, w - thetas[:, None] * x - coupling.T @ q
    want = [(u * v).sum(axis=1) for u, v in ((x, x), (x, rest), (rest, rest), (error, error))]
    assert np.array_equal(got, np.stack(want, axis=1))


@pytest.mark.parametrize("dtype", STORAGE)
def test_sums_have_the_error_of_float64_at_most(cpu_target, dtype):
    """Of numbers over twelve powers of two; a product or a sum in float32 would show 1e-8."""
    rng, n = np.random.default_rng(0), 200_003
    x, y = (rng.standard_normal((1, n)) * 2.0 ** rng.integers(-6, 7, n) for _ in range(2))
    sets = [(kind, padded(z, kind)) for kind, z in [(dtype, x), ("float32", y)]]
    x, y = (rows[0, :n].astype(np.longdouble) for _, rows in sets)
    got = products(cpu_target, 2, sets, n, [(0, 0, 2), (1, 1, 1)])
    for value, terms in zip(got, [x * x, x * y, y * y], strict=True):
        # Each product may round once, and a lane's sum has a thousand terms at most.
        assert abs(value - math.fsum(terms)) <= 20 * 2.0**-53 * math.fsum(abs(terms))


@pytest.mark.parametrize("dtype", STORAGE)
def test_the_result_does_not_depend_on_the_threads(cpu_target, dtype):
    rng, n = np.random.default_rng(0), 150_003
    sets = [(dtype, padded(rng.standard_normal((5, n)), dtype))]
    runs = [(i, i, 5 - i) for i in range(5)]
    one = products(cpu_target, 1, sets, n, runs)
    x, q = (padded(rng.standard_normal((2, n)), dtype) for _ in range(2))
    given = x, rng.standard_normal((2, n)), q, [0.3, 0.7], [1.1, 0.2], np.ones((2, 2)) / 7
    residuals = residual_products(cpu_target, 1, dtype, *given)
    for threads in (2, 3, 16):
        assert np.array_equal(products(cpu_target, threads, sets, n, runs), one)
        again = residual_products(cpu_target, threads, dtype, *given)
        assert np.array_equal(again, residuals)


def test_a_difference_of_nearly_equal_vectors_keeps_its_digits(cpu_target):
    """As of a product and λ times its eigenvector, whose squares agree to the last digit."""
    rng, n = np.random.default_rng(0), 30_001
    x = rng.standard_normal((1, n))
    w = 3 * x + 1e-12 * rng.standard_normal((1, n))
    got = residual_products(cpu_target, 2, "float64", x, w, x, [3.0], [3.0], [[0.0]])[0]
    rest = w[0].astype(np.longdouble) - 3 * x[0].astype(np.longdouble)
    np.testing.assert_allclose(got[2:], math.fsum(rest**2), rtol=1e-3)


def test_rows_without_coupling_are_not_read(cpu_target):
    n = 1000
    x, w, q = np.ones((2, n), np.float32), np.full((2, n), 5.0), np.full((2, n), np.nan, np.float32)
    q[1] = 2
    got = residual_products(cpu_target, 2, "float32", x, w, q, [1, 2], [1, 2], [[0, 0], [3, 0]])
    assert np.array_equal(got, n * np.array([[1, 4, 16, 4], [1, 3, 9, 9]]))


def test_infinities_and_nans_stay_with_their_rows(cpu_target):
    n = 777
    rows = np.ones((3, n), np.float16)
    rows[1, 700], rows[2, 3] = np.inf, np.nan
    got = products(cpu_target, 2, [("float16", rows)], n, [(i, i, 3 - i) for i in range(3)])
    want = [n, np.inf, np.nan, np.inf, np.nan, np.nan]
    assert np.array_equal(got, want, equal_nan=True)


def test_many_products_need_no_memory_for_each_chunk(cpu_target):
    """Of 600 rows a chunk's sums take 1.4 MB; the result is exact all the same."""
    rng, k, n = np.random.default_rng(0), 600, 4000
    rows = rng.integers(-2, 3, (k, n)).astype(np.float64)
    sets = [("float16", rows.astype(np.float16))]
    got = products(cpu_target, 2, sets, n, [(i, i, k - i) for i in range(k)])
    assert np.array_equal(got, (rows @ rows.T)[np.triu_indices(k)])
