"""What each part of the emulated device must compute: checks of a library that a test has built.

python -m tests.native.emulated_checks PART LIBRARY
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import ml_dtypes
import numpy as np
from tests.native import exact_rows

SEEDS = (1, 2, 3)


def pointer(x):
    return x.ctypes.data


class SoftmaxCe(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("rows", "vocab", "tangents")],
        *[(name, ctypes.c_void_p) for name in ("logits", "u", "labels", "weights")],
        *[(name, ctypes.c_void_p) for name in ("products", "grad", "loss", "lse")],
        *[(name, ctypes.c_double) for name in ("softcap", "z_loss", "label_smoothing")],
        ("ignore_index", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
    ]


class BlockOrtho(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("rows", "n", "stride", "used", "block")],
        ("scale", ctypes.c_double),
        ("lazy_below", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        *[(name, ctypes.c_void_p) for name in ("basis", "w", "coefficients", "factor", "info")],
        ("workspace", ctypes.c_void_p),
    ]


class RotateBasis(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        *[(name, ctypes.c_int64) for name in ("rows", "n", "used", "kept")],
        *[(name, ctypes.c_void_p) for name in ("basis", "rotation", "workspace")],
    ]


def guarded(x):
    """A copy of an array behind which lies a page that cannot be read."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(memory, x.dtype, x.size, size - x.nbytes).reshape(x.shape)
    copy[...] = x
    return copy


def check_softmax_ce(library, shared_bytes, rows, vocab, softcap):
    rng = np.random.default_rng(0)
    tangents = 2
    z = rng.normal(size=(rows, vocab)).astype(np.float32) * 3
    u = rng.normal(size=(tangents, rows, vocab)).astype(np.float32)
    labels = guarded(np.array([0, vocab - 1, 5, 7][:rows], np.int32))
    weights = guarded(np.float32([1, 0.5, 2, 3][:rows]))
    cap = softcap * np.tanh(z.astype(float) / softcap) if softcap else z.astype(float)
    slope = 1 - (cap / softcap) ** 2 if softcap else np.ones_like(cap)
    p = np.exp(cap - cap.max(1, keepdims=True))
    total = p.sum(1, keepdims=True)
    lse = np.log(total) + cap.max(1, keepdims=True)
    p /= total
    g = weights[:, None] * (p - np.eye(vocab)[labels])
    tangent = slope * u
    want = weights[:, None] * p * (tangent - (p * tangent).sum(-1, keepdims=True))
    if softcap:
        want = slope * want - 2 * cap / softcap**2 * tangent * g
    for seed in SEEDS:
        products, grad = guarded(u), guarded(z)
        loss, got_lse = np.full(rows, np.nan, np.float32), np.full(rows, np.nan, np.float32)
        workspace = np.full(rows * 8 * 6, np.nan)
        args = SoftmaxCe(0, rows, vocab, tangents, *map(pointer, (grad, products, labels, weights)))
        args.products, args.grad, args.loss, args.lse = map(
            pointer, (products, grad, loss, got_lse)
        )
        args.softcap, args.ignore_index, args.workspace = softcap, -100, pointer(workspace)
        residents = seed  # from a block that takes all rows to one for each
        error = library.softmax_ce(
            seed, ctypes.c_int64(shared_bytes), ctypes.c_int64(residents), ctypes.byref(args)
        )
        assert not error, error
        np.testing.assert_allclose(products, want, atol=1e-6 * np.abs(want).max())
        np.testing.assert_allclose(grad, slope * g, atol=1e-6)
        np.testing.assert_allclose(got_lse, lse[:, 0], rtol=1e-6)
        np.testing.assert_allclose(loss, lse[:, 0] - cap[range(rows), labels], rtol=1e-5)


def check_block_ortho(
    library, shared_bytes, used, b, n, stride, scale, lazy_below=0.0, dependent=0
):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(n, used)))[0].T
    w = rng.normal(size=(b, n)) @ np.diag(np.linspace(1, 3, n)) + 5 * rng.normal(size=(b, used)) @ q
    w[b - dependent :] = w[:dependent]
    w = (w * scale).astype(np.float32)
    results = []
    for seed in SEEDS:
        # The second basis does not begin at a multiple of 16 bytes.
        raw = np.full((used + b + 1) * stride + 4, np.nan, np.float32)
        begin = -raw.ctypes.data // 4 % 4 + (seed == SEEDS[1])
        basis = raw[begin : begin + (used + b + 1) * stride].reshape(-1, stride)
        basis[:used, :n] = q
        block, c, s, info = w.copy(), np.ones((used + b + 1, b)), np.ones((b, b)), np.ones(4)
        args = BlockOrtho(0, used + b + 1, n, stride, used, b, 1.0, lazy_below, 0)
        args.basis, args.w, args.coefficients, args.factor, args.info = map(
            pointer, (basis, block, c, s, info)
        )
        error = library.block_ortho(seed, ctypes.c_int64(shared_bytes), ctypes.byref(args))
        assert not error, error
        new = basis[used : used + b, :n].astype(float)
        stored = basis[:used, :n].astype(float)
        assert (basis[used : used + b, n:] == 0).all()
        assert np.abs(new @ new.T - np.eye(b)).max() <= 1e-6
        assert np.abs(new @ stored.T).max() <= 1e-6
        assert np.isnan(basis[used + b :]).all()
        rest = c[:used].T @ stored + s.T @ new - w
        norms = np.linalg.norm(w.astype(float), axis=1)
        assert (np.linalg.norm(rest, axis=1) <= 3e-6 * norms).all()
        assert info[1] == dependent
        assert dependent or info[0] == 2
        results.append((basis.tobytes(), c.tobytes(), s.tobytes()))
    assert results[0] == results[2]


TYPES = {
    "float64": (1, np.float64),
    "bfloat16": (2, ml_dtypes.bfloat16),
    "float16": (3, np.float16),
}


def check_on_tensor_cores(library, dtype, shared_bytes, used, b, n, stride, random=False):
    rng = np.random.default_rng(0)
    q = exact_rows.walsh(used, 4 ** int(np.ceil(np.log2(n) / 2)))[:, :n]
    if random:
        q = np.linalg.qr(rng.normal(size=(n, used)))[0].T
    w = exact_rows.block(rng, q, b, dtype)
    number, storage = TYPES[dtype]
    results = []
    for seed in SEEDS:
        # The second basis does not begin at a multiple of 16 bytes.
        raw = np.full((used + b + 1) * stride + 16, np.nan, storage)
        begin = -raw.ctypes.data // raw.itemsize % (16 // raw.itemsize) + (seed == SEEDS[1])
        basis = raw[begin : begin + (used + b + 1) * stride].reshape(-1, stride)
        basis[:used, :n] = q
        block, c, s, info = w.copy(), np.ones((used + b + 1, b)), np.ones((b, b)), np.ones(4)
        args = BlockOrtho(number, used + b + 1, n, stride, used, b, 1.0, 1e-3, 0)
        args.basis, args.w, args.coefficients, args.factor, args.info = map(
            pointer, (basis, block, c, s, info)
        )
        error = library.block_ortho_tensor(seed, ctypes.c_int64(shared_bytes), ctypes.byref(args))
        assert not error, error
        if not random:
            exact_rows.check_factors(q, w, c[:used], s, info[2], dtype)
        new, stored = basis[used : used + b, :n].astype(float), basis[:used, :n].astype(float)
        rounding = {"float64": 1e-13, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
        assert np.abs(new @ np.vstack([stored, new]).T - np.eye(b, used + b, used)).max() < rounding
        assert (basis[used : used + b, n:] == 0).all() and np.isnan(basis[used + b :]).all()
        results.append((basis.tobytes(), c.tobytes(), s.tobytes()))
    assert results[0] == results[2]


def check_rotate_basis(library, used, kept, n):
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(used, used)))[0]
    padded = np.full((used + 2, used + 2), np.nan)
    padded[:used, :used] = rotation
    q = rng.normal(size=(used + 2, n)).astype(np.float32)
    want = q.astype(float)
    want[:kept] = rotation[:, :kept].T @ want[:used]
    for seed in SEEDS:
        basis, workspace = q.copy(), np.full((used + 6) ** 2, np.nan)
        args = RotateBasis(0, used + 2, n, used, kept, *map(pointer, (basis, padded, workspace)))
        error = library.rotate_basis(seed, ctypes.byref(args))
        assert not error, error
        np.testing.assert_allclose(basis, want, atol=2e-6)


def check_all_softmax_ce(library):
    for softcap in (0.0, 4.0):
        # Rows that begin everywhere in a vector; then tangents that begin elsewhere in one.
        check_softmax_ce(library, 1 << 20, 4, 2201, softcap)
        check_softmax_ce(library, 0, 3, 8301, softcap)


def check_all_block_ortho(library):
    check_block_ortho(library, 1 << 20, 37, 4, 1800, 1800, 1.0)
    check_block_ortho(library, 1 << 20, 9, 6, 1151, 1152, 1e-25)
    check_block_ortho(library, 1 << 20, 261, 3, 280, 280, 1.0)  # more rows than one round of sums
    check_block_ortho(library, 1 << 20, 5, 4, 900, 900, 1.0, dependent=1)
    check_block_ortho(library, 24 << 10, 37, 4, 1800, 1800, 1.0)  # one stage
    check_block_ortho(library, 0, 37, 4, 1037, 1040, 1.0)  # groups of rows
    check_block_ortho(library, 1 << 20, 9, 4, 300, 300, 1.0, 2.0**-21)
    check_rotate_basis(library, 17, 9, 700)
    check_rotate_basis(library, 6, 5, 133)
    check_rotate_basis(library, 40, 21, 300)
    check_rotate_basis(library, 9, 4, 300)


def check_all_on_tensor_cores(library):
    for dtype in TYPES:
        check_on_tensor_cores(library, dtype, 1 << 20, 85, 8, 1024, 1024)  # a strip for each warp
        check_on_tensor_cores(library, dtype, 1 << 20, 230, 6, 1024, 1024)  # two teams or four
        check_on_tensor_cores(library, dtype, 1 << 20, 21, 13, 1024, 1040)
        check_on_tensor_cores(library, dtype, 0, 60, 8, 256, 256)  # groups of rows
        check_on_tensor_cores(library, dtype, 0, 28, 8, 256, 256)
        check_on_tensor_cores(library, dtype, 1 << 20, 19, 7, 1201, 1208, random=True)


# By the name of the source in simt/ that makes a library of it.
PARTS = {
    "softmax_ce": check_all_softmax_ce,
    "block_ortho": check_all_block_ortho,
    "tensor_cores": check_all_on_tensor_cores,
}


if __name__ == "__main__":
    own = ctypes.CDLL(sys.argv[2])
    for function in ("softmax_ce", "block_ortho", "rotate_basis", "block_ortho_tensor"):
        if hasattr(own, function):
            getattr(own, function).restype = ctypes.c_char_p
    PARTS[sys.argv[1]](own)
