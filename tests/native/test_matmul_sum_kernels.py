"""The matmul_sum kernel against NumPy in float64, at every CPU target of this machine."""

from __future__ import annotations

import numpy as np
import pytest

native = pytest.importorskip("curvax_native_tests")

# (batch, m, n, k): single elements, ragged tiles and panels, more than one of each, a depth of 0.
SIZES = [
    (1, 1, 1, 1),
    (1, 6, 16, 8),
    (2, 7, 17, 9),
    (3, 13, 31, 300),
    (1, 265, 273, 257),
    (1, 5, 1200, 64),
    (2, 530, 3, 519),
    (3, 40, 200, 9000),
    (2, 2500, 20, 70),
    (1, 4, 5, 0),
]
LAYOUTS = {"nn": (False, False), "nt": (False, True), "tn": (True, False), "tt": (True, True)}


def operand(rng, dtype, shape, transposed, batched):
    """A view of shape `shape`, stored transposed or broadcast over the batch."""
    batch, rows, columns = shape
    stored = (columns, rows) if transposed else (rows, columns)
    x = rng.standard_normal((batch if batched else 1, *stored)).astype(dtype)
    return np.broadcast_to(x.swapaxes(1, 2) if transposed else x, shape)


def run(cpu_target, threads, a, b, start, add):
    c = start.copy()
    native.matmul_sum(cpu_target, threads, a, b, c, add)
    return c


@pytest.mark.thin(5)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_of_products_are_those_of_numpy(cpu_target, size, layout, dtype):
    batch, m, n, k = size
    left, right = LAYOUTS[layout]
    rng = np.random.default_rng(batch * m * n + k)
    # The first product's B and the second's A serve the whole batch, as in the head.
    a = [operand(rng, dtype, (batch, m, k), left, t == 0) for t in range(2)]
    b = [operand(rng, dtype, (batch, k, n), right, t == 1) for t in range(2)]
    # What C holds is not read unless it is added to.
    empty = np.full((batch, m, n), np.nan, dtype)
    start = rng.standard_normal((batch, m, n)).astype(dtype)
    wide = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)]
    for terms, add in [(1, False), (2, False), (2, True)]:
        want = sum(x @ y for x, y in wide[:terms]) + add * start.astype(np.float64)
        # Componentwise: (2k + 1) eps |A| |B| bounds any order of summation.
        scale = sum(abs(x) @ abs(y) for x, y in wide[:terms]) + add * abs(start)
        got = run(cpu_target, 2, a[:terms], b[:terms], start if add else empty, add)
        assert np.all(abs(got - want) <= (2 * k + 1) * np.finfo(dtype).eps * scale)


def test_the_result_does_not_depend_on_the_threads(cpu_target):
    rng = np.random.default_rng(0)
    a = [operand(rng, np.float32, (2, 130, 700), False, True)]
    b = [operand(rng, np.float32, (2, 700, 90), False, False)]
    c = np.zeros((2, 130, 90), np.float32)
    one = run(cpu_target, 1, a, b, c, False)
    for threads in (2, 3, 16):
        assert np.array_equal(run(cpu_target, threads, a, b, c, False), one)


# Every combination of zero extents; with no k, what is added to stays.
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [s for s in np.ndindex(2, 2, 2, 2) if 0 in s], ids=str)
def test_zero_extents(cpu_target, size, dtype):
    batch, m, n, k = (5 * extent for extent in size)
    a, b = [np.ones((batch, m, k), dtype)] * 2, [np.ones((batch, k, n), dtype)] * 2
    start = np.full((batch, m, n), 3, dtype)
    for threads in (1, 2):
        assert np.array_equal(run(cpu_target, threads, a, b, start, True), start)
        assert np.array_equal(run(cpu_target, threads, a[:1], b[:1], start, False), 0 * start)


def test_infinities_and_nans_stay_in_their_rows_and_columns(cpu_target):
    a, b = np.ones((1, 20, 30), np.float32), np.ones((1, 30, 40), np.float32)
    a[0, 3, 5], b[0, 7, 11] = np.inf, np.nan
    c = run(cpu_target, 2, [a], [b], np.zeros((1, 20, 40), np.float32), False)[0]
    expected = np.full((20, 40), 30.0)
    expected[3], expected[:, 11] = np.inf, np.nan
    assert np.array_equal(c, expected, equal_nan=True)
