"""What only the kernels for a GPU have: counts on the device, rows in parts, arrays above 2^31.

The rest of this folder runs the same kernels as the target "gpu".
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tests.native import exact_rows
from tests.native import test_softmax_ce_kernels as softmax_ce
from tests.native.test_block_ortho_kernels import STORAGE, check, orthonormal, padded, run, stored

native = pytest.importorskip("curvax_native_tests")


@pytest.mark.parametrize("used", [-1, 6, 1 << 30])
def test_an_impossible_number_of_used_rows_leaves_the_basis_alone(used, rng):
    basis = stored(orthonormal(rng, 5, 300), 4, "float32", 1.0)
    got, c, s, info = run("gpu", 1, "float32", basis, rng.normal(size=(4, 300)), used)
    assert got.tobytes() == basis.tobytes()
    assert np.isnan(c).all() and np.isnan(s).all() and np.isnan(info[2])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    ("used", "b", "n", "columns"),
    [(0, 3, 700, 700), (5, 1, 1024, 1024), (64, 8, 1001, 1008), (21, 13, 777, 777)],
)
def test_a_sweep_reads_the_basis_once(dtype, used, b, n, columns, rng):
    """With and without alignment: every element of the rows and of the block, and no other."""
    basis, w = padded(orthonormal(rng, used, n), columns, b, dtype), rng.normal(size=(b, n))
    native.take_bytes_read()
    info = run("gpu", 1, dtype, basis, w, used)[3]
    size, compute = STORAGE[dtype].itemsize, 8 if dtype == "float64" else 4
    sweeps = info[0] + 1  # each pass is between two
    assert native.take_bytes_read() == sweeps * n * (used * size + b * compute)
    info = run("gpu", 1, dtype, basis, w, used, lazy_below=5e-3)[3]
    assert info[2] < 5e-3  # so the last sweep leaves the basis out
    assert native.take_bytes_read() == n * (info[0] * used * size + sweeps * b * compute)


@pytest.mark.parametrize(
    ("target", "used", "b", "n", "again"),
    [("gpu", 290, 8, 430, 0), ("gpu", 530, 8, 560, 1), ("gpu-parts", 75, 5, 900, 1)],
)
def test_rows_beyond_one_panel_are_read_again_for_products(target, used, b, n, again, rng):
    """A panel of 290 rows fits and its sums take two rounds; 530 rows are taken in groups."""
    q, w = orthonormal(rng, used, n), rng.normal(size=(b, n)) + 3
    native.take_bytes_read()
    out = run(target, 1, "float32", stored(q, b, "float32", 1.0), w, used)
    read = native.take_bytes_read()
    check("float32", out[0], w, *out[1:], used)
    passes = out[3][0]
    assert read == 4 * n * ((passes + 1) * (used + b) + again * (passes - 1) * used)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    ("target", "used", "b", "n", "spare"),
    [
        ("gpu", 40, 8, 1024, 0),
        ("gpu", 21, 13, 1024, 0),
        ("gpu", 85, 8, 1024, 0),
        ("gpu", 230, 13, 1024, 0),
        ("gpu", 620, 5, 1024, 0),
        ("gpu-parts", 60, 8, 256, 100),
        ("gpu-parts", 28, 8, 256, 0),
    ],
)
def test_blocks_are_computed_in_the_compute_type(target, used, b, n, spare, dtype, rng):
    """Also where tensor cores make the products; a warp has a strip, or two or four share it.

    Rows are in one group, or in several, of which the last may have fewer or none that are used.
    """
    q = exact_rows.walsh(used, n)
    w = exact_rows.block(rng, q, b, dtype)
    basis = stored(q, b + spare, dtype, 1.0)
    # The second update then changes nothing of C.
    _, c, s, info = run(target, 1, dtype, basis, w, used, lazy_below=1e-3)
    exact_rows.check_factors(q, w, c[:used], s, info[2], dtype)


def begin_anywhere(x):
    """A copy of an array whose data begin one element after an aligned address."""
    raw = np.zeros(x.size + 17, x.dtype)
    start = -raw.ctypes.data // x.itemsize % (16 // x.itemsize) + 1
    raw[start : start + x.size] = x.ravel()
    return raw[start : start + x.size].reshape(x.shape)


def test_arrays_that_begin_anywhere(rng):
    """128-bit loads need rows that begin at a multiple of 16 bytes."""
    q, w = orthonormal(rng, 6, 512), rng.normal(size=(3, 512)).astype(np.float32)
    aligned = run("gpu", 1, "float32", stored(q, 4, "float32", 1.0), w, 6)
    basis, block = begin_anywhere(stored(q, 4, "float32", 1.0)), begin_anywhere(w)
    assert basis.ctypes.data % 16 == 4
    c, s, info = np.zeros((10, 3)), np.zeros((3, 3)), np.zeros(4)
    native.block_ortho("gpu", 1, "float32", basis, block, 6, 3, 1.0, c, s, info)
    np.testing.assert_allclose(basis, aligned[0], atol=1e-6)
    rotation = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    want = rotation[:9, :4].T @ basis[:9].astype(np.float64)
    native.rotate_basis("gpu", 1, "float32", basis, rotation, 9, 4)
    np.testing.assert_allclose(basis[:4], want, atol=1e-6)


@pytest.mark.parametrize(("used", "kept"), [(5, 6), (9, 2), (-1, -1), (3, -1)])
def test_an_impossible_rotation_leaves_nan(used, kept, rng):
    basis = rng.normal(size=(8, 333)).astype(np.float32)
    native.rotate_basis("gpu", 1, "float32", basis, np.eye(8), used, kept)
    assert np.isnan(basis).all()


def test_rotation_of_very_many_rows(rng):
    """So many that a panel is narrower than a vector of 16 bytes can be."""
    rows, n = 13000, 12
    basis = rng.normal(size=(rows, n)).astype(np.float16)
    rotation = np.zeros((rows, rows))  # pages that are not touched take no memory
    rotation[:5, :3] = rng.normal(size=(5, 3))
    want = rotation[:5, :3].T @ basis[:5].astype(np.float64)
    rest = basis[3:].copy()
    native.rotate_basis("gpu", 1, "float16", basis.view(np.uint16), rotation, 5, 3)
    np.testing.assert_allclose(basis[:3], want, rtol=2**-9, atol=1e-3)
    assert basis[3:].tobytes() == rest.tobytes()


def test_a_row_of_minus_infinity_alone_is_the_same_everywhere():
    targets = [*native.targets(), *native.emulated()]
    for target in targets:
        z, u = np.full((1, 20000), -np.inf, np.float32), np.ones((1, 1, 20000), np.float32)
        loss, lse, grad = np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros_like(z)
        labels, weights = np.zeros(1, np.int32), np.ones(1, np.float32)
        options = (0.0, 0.0, 0.0, -100)
        native.softmax_ce(target, 1, "float32", z, u, labels, weights, u, grad, loss, lse, *options)
        assert lse[0] == -np.inf, target
        assert np.isnan(u).all() and np.isnan(grad).all() and np.isnan(loss).all(), target


def test_rows_in_parts_agree_with_whole_ones(rng):
    n, v = 3, 20000  # three parts
    z = rng.normal(size=(n, v)).astype(np.float32)
    u = rng.normal(size=(2, n, v)).astype(np.float32)
    labels, weights = np.array([0, 8192, v - 1], np.int32), np.ones(n, np.float32)
    results = []
    for target in native.emulated():
        got, grad, loss, lse = u.copy(), z.copy(), np.zeros(n, np.float32), np.zeros(n, np.float32)
        options = (5.0, 1e-3, 0.1, -100)
        native.softmax_ce(
            target, 1, "float32", grad, got, labels, weights, got, grad, loss, lse, *options
        )
        results.append((got, grad, loss, lse))
    for whole, parts in zip(*results, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=3e-6, atol=1e-7 * np.abs(whole).max())


@pytest.mark.thin(6)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("target", "vocab"), [("gpu", 2051), ("gpu-parts", 16700)])
def test_the_same_bits_for_any_number_of_resident_blocks(target, vocab, dtype, rng):
    """A block takes one row, or part of a row, after another: 7 rows, 21 parts."""
    z, u, labels, weights = softmax_ce.make(rng, dtype, 7, vocab, 2)
    labels[2:4], weights[5] = -100, 0
    options = (20.0, 1e-2, 0.1, -100)
    for full in (True, False):
        runs = [
            softmax_ce.run(
                f"{target}/{residents}", residents, dtype, z, u, labels, weights, options, full
            )
            for residents in (1, 2, 4, 5, 100)
        ]
        want = softmax_ce.expected(z, u, labels, weights, *options)
        if full:
            softmax_ce.check(runs[0], want, dtype)
        for other in runs[1:]:
            assert [x.tobytes() for x in other] == [x.tobytes() for x in runs[0]]


@pytest.mark.parametrize("target", native.emulated())
def test_rows_whose_tangents_begin_elsewhere_in_a_vector(target, rng):
    """Each of logits, tangents, products and gradient at an address of its own."""
    n, vocab = 3, 2311
    z, u, labels, weights = softmax_ce.make(rng, "float32", n, vocab, 2)
    options = (0.0, 1e-2, 0.1, -100)
    want = softmax_ce.expected(z, u, labels, weights, *options)
    for shifts in [(0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 2, 3), (0, 3, 0, 1), (2, 0, 2, 2)]:
        z_at, u_at, products, grad = (
            softmax_ce.offset(x, shift)
            for x, shift in zip((z, u, 7 * u, 7 * z), shifts, strict=True)
        )
        loss, lse = np.zeros(n, np.float32), np.zeros(n, np.float32)
        native.softmax_ce(
            target, 1, "float32", z_at, u_at, labels, weights, products, grad, loss, lse, *options
        )
        softmax_ce.check((loss, lse, grad, products), want, "float32")
        assert z_at.tobytes() == z.tobytes() and u_at.tobytes() == u.tobytes()


@pytest.mark.parametrize(("target", "parts"), [("gpu", 1), ("gpu-parts", 7)])
def test_more_than_two_to_the_31_elements(target, parts, rng):
    n, v, last = 42700, 50304, 2
    assert n * v > 2**31
    # Pages that are not touched take no memory.
    z, u = np.zeros((n, v), np.uint16), np.zeros((n, v), np.uint16)
    head = rng.normal(size=(2, last, v)).astype(ml_dtypes.bfloat16)
    z[-last:], u[-last:] = head.view(np.uint16)
    labels, weights = np.zeros(n, np.int32), np.ones(n, np.float32)
    native.softmax_ce_last_blocks(target, (n - last) * parts, z, u, labels, weights)
    logits, tangents = head.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    want = p * (tangents - (p * tangents).sum(1, keepdims=True))
    got = u[-last:].view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-9)
    assert not u[:-last:997].any()
