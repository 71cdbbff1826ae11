"""The emulated GPU finds what is wrong: device code with a barrier removed, or off by one, fails.

Each mutant is a copy of the kernels with one change, compiled by itself and given the same checks
as the code that is shipped. Every barrier is removed once.
"""

from __future__ import annotations

import ctypes
import mmap
import pathlib
import re
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from tests.native import exact_rows

ROOT = pathlib.Path(__file__).parents[2]
CUDA = ROOT / "kernels" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
DEFINES = ["-DCURVAX_SIMT", "-DCURVAX_TARGET=simt_device"]
SEEDS = (1, 2, 3)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


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


def check_tensor(path):
    library = ctypes.CDLL(str(path))
    library.block_ortho_tensor.restype = ctypes.c_char_p
    for dtype in TYPES:
        check_on_tensor_cores(library, dtype, 1 << 20, 85, 8, 1024, 1024)  # a strip for each warp
        check_on_tensor_cores(library, dtype, 1 << 20, 230, 6, 1024, 1024)  # two teams or four
        check_on_tensor_cores(library, dtype, 1 << 20, 21, 13, 1024, 1040)
        check_on_tensor_cores(library, dtype, 0, 60, 8, 256, 256)  # groups of rows
        check_on_tensor_cores(library, dtype, 0, 28, 8, 256, 256)
        check_on_tensor_cores(library, dtype, 1 << 20, 19, 7, 1201, 1208, random=True)


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


def check(path):
    library = ctypes.CDLL(str(path))
    for name in ("softmax_ce", "block_ortho", "rotate_basis"):
        getattr(library, name).restype = ctypes.c_char_p
    for softcap in (0.0, 4.0):
        # Rows that begin everywhere in a vector; then tangents that begin elsewhere in one.
        check_softmax_ce(library, 1 << 20, 4, 2201, softcap)
        check_softmax_ce(library, 0, 3, 8301, softcap)
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


# Files that only blocks on tensor cores take.
TENSOR = ("mma.cuh", "tensor_sums.cuh", "tensor_tiles.cuh", "tensor_update.cuh")


def build(folder, change=None, tensor=False):
    """The library of the kernels with ``change = (file, position, old, new)`` made to a copy."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "kernels", kernels)
    if change is not None:
        name, at, old, new = change
        text = (kernels / "cuda" / name).read_text()
        assert text[at : at + len(old)] == old
        (kernels / "cuda" / name).write_text(text[:at] + new + text[at + len(old) :])
    simt = ROOT / "tests" / "native" / "simt"
    include = [f"-I{kernels}", f"-I{kernels / 'include'}", f"-I{simt.parent}"]
    exports = "exports_tensor.cc" if tensor else "exports.cc"
    library = folder / "kernels.so"
    sources = [str(simt / name) for name in (exports, "mma.cc", "simt.cc")]
    subprocess.run(
        [COMPILER, *FLAGS, *DEFINES, *include, *sources, "-o", str(library)],
        check=True,
        capture_output=True,
    )
    return library


def barriers():
    """Those of the block, and the waits for its copies."""
    for path in sorted(CUDA.glob("*.cuh")):
        text = path.read_text()
        for match in re.finditer(
            r"(?<=\n) +(if \(ahead\) )?(SyncThreads|WaitForCopies)\(\);", text
        ):
            # That of Sums, which the barriers of what follows its only use make superfluous.
            if "f(i, sum);\n    }\n" in text[match.start() - 30 : match.start()]:
                continue
            line = text.count("\n", 0, match.start()) + 1
            change = (path.name, match.start(), match.group(), "")
            yield pytest.param(change, path.name in TENSOR, id=f"{path.name}:{line}")


OFF_BY_ONE = [
    ("softmax_ce_row.cuh", "return j >= 0 && j < count_;", "return j >= 0 && j <= count_;"),
    ("softmax_ce_row.cuh", "return v * V - shift_;", "return v * V - shift_ + 1;"),
    ("softmax_ce_row.cuh", "CeilDiv(count + shift_, V)", "(count + shift_) / V"),
    ("softmax_ce_row.cuh", "/ (kTile * V) : 0", "/ (kTile * V) + 1 : 0"),
    ("softmax_ce_row.cuh", "shift_ > 0 ? 1 : 0", "shift_ > 0 ? 0 : 0"),
    ("softmax_ce_row.cuh", "Warp() < begin ? Warp() + warps", "Warp() < begin ? Warp()"),
    ("softmax_ce_row.cuh", "tile < begin || tile >= end", "tile < begin || tile > end"),
    ("softmax_ce.cuh", "row_ += blocks / parts_", "row_ += blocks / parts_ + 1"),
    ("softmax_ce.cuh", "part_ >= parts_", "part_ > parts_"),
    ("softmax_ce.cuh", "if (HasRow()) {", "if (row_ <= args_.rows) {"),
    ("softmax_ce.cuh", "= queue.HasRow() && !queue", "= !queue"),
    ("softmax_ce.cuh", "int p = Lane(); p <", "int p = Lane() + 1; p <"),
    ("device.cuh", "Lane() < Warps() ? memory[i", "Lane() < Warps() - 1 ? memory[i"),
    ("device.cuh", "    memory_ = other_;\n", ""),
    ("block_ortho_launch.h", "% sizeof(Bytes16) == 0;", "% 4 == 0;"),
    ("panel.cuh", "left >= 1 << log_panel", "left + 1 >= 1 << log_panel"),
    ("panel.cuh", "if (i >= left)", "if (i + 1 >= left)"),
    ("panel.cuh", "(1 << log_step) - 1) >> log_step", "(1 << log_step) - 2) >> log_step"),
    ("block_ortho_sweep.cuh", "i = n() + Th", "i = n() + 1 + Th"),
    (
        "row_update.cuh",
        "k < 1 << shape.log_sharers",
        "k < shape.log_sharers",
    ),
    ("panel.cuh", "if (k < left)", "if (k < left - 1)"),
    ("panel.cuh", "left >= N &&", "left >= N - 1 &&"),
    ("block_ortho_sweep.cuh", "if (!keep_products || flush) {", "if (flush) {"),
    ("block_ortho_sweep.cuh", "kFlushPanels == 0 || last_panel);", "kFlushPanels == 0);"),
    ("block_ortho_sweep.cuh", "{item.count + 1, 0}) >= n()", "{item.count + 2, 0}) >= n()"),
    ("block_ortho_sweep.cuh", "item.part != groups() - 1", "item.part != 0"),
    ("block_ortho_sweep.cuh", "if (item.part != 0) {", "if (item.part > 1) {"),
    ("block_ortho_sweep.cuh", "item.part >= Parts(update) - groups()", "item.part >= 0"),
    ("block_ortho_sweep.cuh", "|| what == NextSweep::kStoreMixed;", ";"),
    ("block_ortho_sweep.cuh", "Min(group(), rows_ - FirstOfGroup(item))", "group()"),
    ("row_sums.cuh", "if (owner && row < rows)", "if (owner && row <= rows)"),
    ("row_sums.cuh", "(lane >> log_owned)", "(lane >> log_owned) + 1"),
    ("row_sums.cuh", "int strip = SharedLane(shape) >> kLogLanes", "int strip = 1"),
    ("row_sums.cuh", "sum_[j][c] = 0", "sum_[j][c] *= 0.5f"),
    ("block_ortho.cuh", "k = 1; k < kShares", "k = 2; k < kShares"),
    ("device.cuh", "int mask = kWarpSize / 2", "int mask = kWarpSize / 4"),
    ("rotate_basis.cuh", "if (row < used) *", "if (row < used - 1) *"),
    ("rotate_basis.cuh", "if (i >= width) return;", "if (i + 4 >= width) return;"),
    ("rotate_basis.cuh", "g = whole + team / split", "g = team / split"),
    ("rotate_basis.cuh", "left * 2 <= teams", "left * 2 <= teams + 2"),
    ("rotate_basis.cuh", "left * 4 <= teams", "left * 4 <= teams + 4"),
    ("rotate_basis.cuh", "j < kept ? launch", "j < kept - 1 ? launch"),
    ("rotate_basis.cuh", "if (j >= p.kept) continue", "if (j > p.kept) continue"),
    ("rotate_basis.cuh", "e * stride, p.width - 1)", "e * stride, p.width - 2)"),
]


# Of what is made on tensor cores: parts of numbers left out, fragments in another order.
ON_TENSOR_CORES = [
    ("mma.cuh", "Mma::Multiply(d, a[k], b[k].low);", "(void)b;"),
    ("mma.cuh", "Mma::Multiply(d, a[k], b[k].middle);", "(void)b;"),
    ("mma.cuh", "Mma::Multiply(d, {a[k].low[0], 0, a[k].low[1], 0}, b[k].high);", ""),
    ("mma.cuh", "[1] = a[k].middle[0]", "[1] = a[k].middle[1]"),
    ("mma.cuh", "  *x -= BitCast<float>(bits);\n", ""),
    ("mma.cuh", "kBf16Bits = 0xffff0000u", "kBf16Bits = 0xfff80000u"),
    ("mma.cuh", "kTf32Bits = 0xffffe000u", "kTf32Bits = 0xfffffc00u"),
    (
        "mma.cuh",
        "first = x[2 * i], second = x[2 * i + 1]",
        "first = x[2 * i + 1], second = x[2 * i]",
    ),
    ("tensor_tiles.cuh", "loaded[2 * part + i % 2]", "loaded[2 * part + i / 2]"),
    ("tensor_tiles.cuh", "k = r % 2 + r % 16 / 8 * 2", "k = r % 2 * 2 + r % 16 / 8"),
    ("tensor_tiles.cuh", "^ (16 * s + 8 * h)", "^ (8 * s + 16 * h)"),
    ("tensor_tiles.cuh", "LoadMatrices<true>(", "LoadMatrices<false>("),
    ("tensor_tiles.cuh", "row(rows.Offset(Lane() % 16,", "row(rows.Offset(Lane() % 16 ^ 8,"),
    ("tensor_tiles.cuh", "rows_[s][k] += d[k]", "rows_[s][k] = d[k]"),
    ("tensor_tiles.cuh", "^ k % 2 * 12)", "^ k % 2 * 4)"),
    ("tensor_tiles.cuh", "Tf32::Multiply(block_[s], high, parts.middle);", ""),
    ("tensor_tiles.cuh", "a[h], q[j]", "a[1 - h], q[j]"),
    ("tensor_tiles.cuh", "sum_[0][k], sum_[1][k]", "sum_[k][0], sum_[k][1]"),
    ("tensor_sums.cuh", "sum_[p + k][e] = 0", "sum_[p + k][e] *= C(0.5)"),
    ("tensor_sums.cuh", "e / 2 * 8, c = column + e % 2", "e % 2 * 8, c = column + e / 2"),
    ("tensor_sums.cuh", "if (r < rows && c", "if (r <= rows && c"),
    ("tensor_sums.cuh", "Warp() - warp.strip + s", "Warp() - warp.strip"),
    ("tensor_sums.cuh", "other == column", "other <= column"),
    ("tensor_sums.cuh", "if (p >= first + tiles) break", "if (p > first + tiles) break"),
    ("tensor_update.cuh", "r += teams", "r += teams + 1"),
    ("tensor_update.cuh", "c >= shape.columns", "c > shape.columns"),
    ("tensor_update.cuh", "exchange + k * share", "exchange"),
    ("block_ortho_sweep.cuh", "          *RowsOf(item.count).At(r, Element()) = S{};\n", ""),
    ("block_ortho_sweep.cuh", "groups() == 1 ? rows_ : 0", "Min(group(), rows_)"),
    ("block_ortho_sweep.cuh", "if (kTensor && groups() > 1) SyncThreads();", ""),
    ("block_ortho_sweep.cuh", "if (!keep_gram || flush) sums", "if (!keep_gram) sums"),
]


def changes():
    for changed, tensor in ((OFF_BY_ONE, False), (ON_TENSOR_CORES, True)):
        for name, old, new in changed:
            change = (name, (CUDA / name).read_text().index(old), old, new)
            yield pytest.param(change, tensor, id=f"{name}: {new or 'without ' + old.strip()}")


def run_checks(library, tensor):
    """In a process of its own, which a mutant may crash."""
    command = [sys.executable, "-m", "tests.native.test_mutants", str(library)]
    command += ["tensor"] * tensor
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.parametrize("tensor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_code_as_it_is(tensor, tmp_path):
    result = run_checks(build(tmp_path, tensor=tensor), tensor)
    assert result.returncode == 0, result.stderr


@pytest.mark.thin(24)
@pytest.mark.parametrize(("change", "tensor"), [*barriers(), *changes()])
def test_a_broken_kernel_is_found(change, tensor, tmp_path):
    assert run_checks(build(tmp_path, change, tensor), tensor).returncode != 0


if __name__ == "__main__":
    (check_tensor if "tensor" in sys.argv else check)(sys.argv[1])
