"""The block_ortho kernels against NumPy in float64, at every CPU target of this machine."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

native = pytest.importorskip("curvax_native_tests")

STORAGE = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Loss of orthogonality allowed, and error of W = C^T Q + S^T Q_new relative to the norm of W.
ORTHOGONALITY = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 1e-2, "float16": 1e-3}
IDENTITY = {"float32": 3e-6, "float64": 1e-14, "bfloat16": 1e-2, "float16": 1e-3}


def bits(x):
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def same(a, b):
    return a.tobytes() == b.tobytes()


def orthonormal(rng, rows, n):
    return np.linalg.qr(rng.normal(size=(n, rows)))[0].T if rows else np.zeros((0, n))


def stored(q, spare, dtype, scale):
    """``q`` in storage, with `spare` rows of NaN below it: they must never be read."""
    basis = np.full((len(q) + spare, q.shape[1]), np.nan)
    basis[: len(q)] = q * scale
    return basis.astype(STORAGE[dtype])


def run(target, threads, dtype, basis, w, used, seed=3, scale=1.0, lazy_below=0.0):
    basis = basis.copy()
    w = w.astype(np.float64 if dtype == "float64" else np.float32)
    b = len(w)
    c, s, info = np.full((len(basis), b), 7.0), np.full((b, b), 7.0), np.full(4, 7.0)
    small = c, s, info
    native.block_ortho(
        target, threads, dtype, bits(basis), w, used, seed, scale, *small, lazy_below=lazy_below
    )
    return basis, c, s, info


def check(dtype, basis, w, c, s, info, used, scale=1.0):
    """New rows orthonormal, later rows untouched, factors of the right shape, identity kept."""
    b = len(w)
    q = basis.astype(np.float64) / scale
    new = q[used : used + b]
    error = np.abs(np.hstack([new @ q[:used].T, new @ new.T - np.eye(b)])).max()
    assert error <= ORTHOGONALITY[dtype], f"orthogonality {error:.1e}, info {info}"
    assert np.isnan(q[used + b :]).all()
    assert (c[used:] == 0).all() and (np.tril(s, -1) == 0).all()
    w = w.astype(np.float64 if dtype == "float64" else np.float32).astype(np.float64)
    norms = np.linalg.norm(w, axis=1)
    rest = np.linalg.norm(c[:used].T @ q[:used] + s.T @ new - w, axis=1)
    assert (rest <= IDENTITY[dtype] * norms).all(), f"identity {rest / norms}, info {info}"


CASES = [
    (0, 1, 17),
    (0, 4, 1001),
    (5, 3, 64),
    (33, 8, 5000),
    (31, 5, 4096),
    (17, 13, 3001),
    (9, 1, 9000),
    (70, 2, 2100),
    (3, 32, 900),
]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("used", "b", "n"), CASES)
def test_random_blocks(target, dtype, used, b, n, rng):
    scale = n**0.5 if dtype == "float16" else 1.0
    basis = stored(orthonormal(rng, used, n), b + 2, dtype, scale)
    w = rng.normal(size=(b, n))
    out = run(target, 2, dtype, basis, w, used, scale=scale)
    check(dtype, out[0], w, *out[1:], used, scale)
    assert out[3][0] <= 3 and out[3][1] == 0


def hard_blocks(rng, q, b, n):
    m = len(q)
    left, right = orthonormal(rng, b, b), orthonormal(rng, b, n)
    random = rng.normal(size=(b, n))
    duplicate = random.copy()
    duplicate[b // 2] = duplicate[0]
    mixed = random.copy()
    mixed[1], mixed[2] = 0, random[0] - 2 * random[3]
    inside = rng.normal(size=(b, m)) @ q
    # name: block, directions that must be replaced (None: depends on the precision)
    return {
        "condition 1e3": ((left * np.logspace(0, -3, b)) @ right, 0),
        "condition 1e12": ((left * np.logspace(0, -12, b)) @ right, None),
        "duplicate": (duplicate, 1),
        "zero and dependent": (mixed, 2),
        "in the span": (inside, b),
        "near the span": (inside + 1e-4 * rng.normal(size=(b, n)) / n**0.5, 0),
        "zero": (np.zeros((b, n)), b),
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", hard_blocks(np.random.default_rng(0), np.eye(2, 9), 5, 9))
def test_hard_blocks(target, dtype, name, rng):
    used, b, n = 23, 6, 4003
    q = orthonormal(rng, used, n)
    w, replaced = hard_blocks(rng, q, b, n)[name]
    out = run(target, 2, dtype, stored(q, b + 1, dtype, 1.0), w, used)
    check(dtype, out[0], w, *out[1:], used)
    info, s = out[3], out[2]
    assert info[0] <= 6 and info[2] <= 1e-2
    if replaced is not None:
        assert info[1] == replaced
        assert (np.abs(s).max(1) == 0).sum() == replaced  # zero coupling


LAZY = {"float32": 2.0**-21, "float64": 2.0**-50, "bfloat16": 2.0**-11, "float16": 2.0**-14}


@pytest.mark.parametrize("dtype", LAZY)
@pytest.mark.parametrize("b", [1, 5])
def test_lazy_random_blocks_keep_the_measured_deviation(target, dtype, b, rng):
    """The first update has left nothing but rounding errors: the second only scales.

    The new rows' own rounding, of norm 0.2 eps in 16 bits, adds 0.2 eps / sqrt(n) to a product.
    """
    used, n = 23, 4003
    basis, w = stored(orthonormal(rng, used, n), b + 1, dtype, 1.0), rng.normal(size=(b, n))
    full = run(target, 2, dtype, basis, w, used)
    lazy = run(target, 2, dtype, basis, w, used, lazy_below=LAZY[dtype])
    check(dtype, lazy[0], w, *lazy[1:], used)
    assert same(lazy[3], full[3]) and 0 < lazy[3][2] < LAZY[dtype]
    new = lazy[0][used : used + b].astype(np.float64)
    stays = np.abs(new @ basis[:used].astype(np.float64).T).max()
    assert stays <= lazy[3][2] + LAZY[dtype] / 4
    # C is that of the first update alone: what it left is not subtracted.
    assert not same(lazy[1], full[1])
    np.testing.assert_allclose(lazy[1], full[1], atol=LAZY[dtype] * n**0.5)


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *itertools.product(
            ["float32", "float64"], ["condition 1e3", "a hundredth outside the span"]
        ),
        ("bfloat16", "a hundredth outside the span"),
        ("float16", "a hundredth outside the span"),
    ],
)
def test_lazy_nearly_dependent_blocks_are_updated_again(target, dtype, name, rng):
    """What the first update leaves is then some hundred times larger than its rounding errors."""
    used, b, n = 23, 6, 4003
    q = orthonormal(rng, used, n)
    outside = rng.normal(size=(b, used)) @ q + 1e-2 * orthonormal(rng, b, n)
    basis = stored(q, b + 1, dtype, 1.0)
    w = outside if "span" in name else hard_blocks(rng, q, b, n)[name][0]
    full = run(target, 2, dtype, basis, w, used)
    lazy = run(target, 2, dtype, basis, w, used, lazy_below=LAZY[dtype])
    assert full[3][2] >= LAZY[dtype]
    assert all(same(a, b_) for a, b_ in zip(lazy, full, strict=True))


@pytest.mark.parametrize("name", ["duplicate", "zero and dependent", "in the span", "zero"])
def test_lazy_blocks_with_replaced_directions(target, name, rng):
    used, b, n = 23, 6, 4003
    q = orthonormal(rng, used, n)
    w, replaced = hard_blocks(rng, q, b, n)[name]
    out = run(
        target, 2, "float32", stored(q, b + 1, "float32", 1.0), w, used, lazy_below=LAZY["float32"]
    )
    check("float32", out[0], w, *out[1:], used)
    assert out[3][1] == replaced


def test_lazy_lanczos(target, rng):
    """30 steps of Lanczos: most updates are left out, and the basis is orthonormal to 1e-6."""
    n, steps = 1030, 30
    spectrum = np.concatenate([np.linspace(1, 5, 6), rng.uniform(-1, 1, n - 6)])
    basis = np.full((steps + 1, n), np.nan, np.float32)
    w, left_out, projected = rng.normal(size=(1, n)), 0, np.zeros((steps + 1, steps + 1))
    for used in range(steps + 1):
        basis, c, s, info = run(target, 2, "float32", basis, w, used, lazy_below=LAZY["float32"])
        left_out += info[2] < LAZY["float32"]
        if used:
            projected[:, used - 1], projected[used, used - 1] = c[:, 0], s[0, 0]
        w = spectrum * basis[used : used + 1].astype(np.float64)
    q = basis.astype(np.float64)
    assert np.abs(q @ q.T - np.eye(steps + 1)).max() <= 1e-6
    assert left_out >= 0.8 * steps
    # The rows are orthonormal enough for the recurrence's matrix to be the projected one.
    want = (q[:steps] * spectrum) @ q[:steps].T
    np.testing.assert_allclose(projected[:steps, :steps], want, atol=5e-6)


@pytest.mark.parametrize("name", ["condition 1e3", "zero and dependent", "in the span"])
@pytest.mark.parametrize("exponent", [-100, -46, 46, 100])
def test_scaling_the_block_scales_the_factors_alone(target, name, exponent, rng):
    used, b, n = 12, 4, 2050
    q = orthonormal(rng, used, n)
    w = hard_blocks(rng, q, b, n)[name][0].astype(np.float32)
    basis = stored(q, b, "float32", 1.0)
    one = run(target, 1, "float32", basis, w, used)
    other = run(target, 1, "float32", basis, np.ldexp(w, exponent), used)
    assert one[3][0] == other[3][0] and one[3][1] == other[3][1]
    np.testing.assert_allclose(one[0], other[0], atol=2e-5)
    size = np.abs(one[1]).max()
    np.testing.assert_allclose(np.ldexp(other[1], -exponent), one[1], atol=2e-6 * size)
    np.testing.assert_allclose(np.ldexp(other[2], -exponent), one[2], atol=2e-6 * size)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_input_ends_at_once(target, bad, rng):
    w = rng.normal(size=(3, 500))
    w[1, 77] = bad
    basis, c, s, info = run(
        target, 2, "float32", stored(orthonormal(rng, 4, 500), 4, "float32", 1.0), w, 4
    )
    assert np.isnan(info[2]) and info[0] <= 1
    assert np.isnan(basis[4:7]).all() and np.isnan(c[:4]).all() and np.isnan(s).all()


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("name", ["condition 1e3", "zero and dependent"])
def test_bitwise_equal_for_any_thread_count(target, dtype, name, rng):
    used, b, n = 10, 5, 10_001 if target == "gpu" else 70_001  # emulated: 13 panels per block
    q = orthonormal(rng, used, n)
    w = hard_blocks(rng, q, b, n)[name][0]
    basis = stored(q, b + 1, dtype, 1.0)
    first = run(target, 1, dtype, basis, w, used)
    for threads in (2, 3, 5):
        other = run(target, threads, dtype, basis, w, used)
        for a, b_ in zip(first, other, strict=True):
            assert same(a, b_)


def padded(q, columns, spare, dtype):
    """`stored`, with padding of NaN: neither that of used rows nor that of others is used."""
    basis = np.full((len(q) + spare, columns), np.nan)
    basis[: len(q), : q.shape[1]] = q
    return basis.astype(STORAGE[dtype])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    ("used", "b", "n", "columns"), [(9, 3, 3001, 3008), (21, 8, 2050, 2080), (0, 2, 50, 777)]
)
def test_padding_of_rows_changes_nothing(target, dtype, used, b, n, columns, rng):
    """Widths of vectors depend on the alignment: sums are of the same terms in another order."""
    q, w = orthonormal(rng, used, n), rng.normal(size=(b, n))
    plain = run(target, 2, dtype, stored(q, b + 1, dtype, 1.0), w, used)
    basis, *small = run(target, 2, dtype, padded(q, columns, b + 1, dtype), w, used)
    check(dtype, np.ascontiguousarray(basis[:, :n]), w, *small, used)
    assert (basis[used : used + b, n:] == 0).all()
    assert np.isnan(basis[used + b :]).all() and np.isnan(basis[:used, n:]).all()
    if target != "gpu":
        assert same(np.ascontiguousarray(basis[:, :n]), plain[0])
        assert all(same(a, b_) for a, b_ in zip(small, plain[1:], strict=True))
    eps = 2.0**-52 if dtype == "float64" else 2.0**-23
    for got, want in zip(small[:2], plain[1:3], strict=True):
        np.testing.assert_allclose(got, want, atol=8 * eps * np.linalg.norm(w, axis=1).max())


def test_padding_of_a_block_that_is_not_finite(target, rng):
    w = rng.normal(size=(2, 301))
    w[0, 300] = np.inf
    basis = run(target, 1, "float32", padded(orthonormal(rng, 4, 301), 320, 3, "float32"), w, 4)[0]
    assert np.isnan(basis[4:6, :301]).all() and (basis[4:6, 301:] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(sorted(STORAGE)),
    used=st.integers(0, 40),
    b=st.integers(1, 9),
    extra=st.integers(0, 700),
    shift=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_alignment(dtype, used, b, extra, shift, seed):
    rng = np.random.default_rng(seed)
    n = used + b + extra
    basis = stored(orthonormal(rng, used, n), b, dtype, 1.0)
    raw = np.zeros(basis.size + shift, basis.dtype)
    raw[shift:] = basis.ravel()
    w = rng.normal(size=(b, n))
    for target in native.targets():
        basis = raw[shift:].reshape(-1, n)
        out = run(target, 2, dtype, basis, w, used)
        check(dtype, out[0], w, *out[1:], used)


def test_rows_that_share_cache_sets(target, rng):
    """A power-of-two length: panels are copied before they are used twice."""
    used, b, n = 40, 4, 1 << 15
    q = orthonormal(rng, used, n)
    w = rng.normal(size=(b, n)) + 5 * q[0]
    out = run(target, 2, "float32", stored(q, b, "float32", 1.0), w, used)
    check("float32", out[0], w, *out[1:], used)


def test_seed_decides_the_replacements(target, rng):
    basis, w = stored(orthonormal(rng, 3, 800), 2, "float32", 1.0), np.zeros((2, 800))
    one, same, other = (run(target, 1, "float32", basis, w, 3, seed=s)[0] for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert np.abs(one[3:] @ other[3:].T).max() < 0.3


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    ("used", "kept", "n"),
    [(1, 1, 5), (30, 7, 2049), (33, 33, 1000), (12, 0, 64), (60, 40, 520), (27, 2, 301)],
)
def test_rotation(target, dtype, used, kept, n, rng):
    rows = used + 3
    basis = rng.normal(size=(rows, n)).astype(STORAGE[dtype])
    basis[used:] = np.nan
    rotation = np.full((rows, rows), np.nan)
    rotation[:used, :used] = orthonormal(rng, used, used)
    rotation[:used, kept:] = np.nan
    want = rotation[:used, :kept].T @ basis[:used].astype(np.float64)
    first = None
    for threads in (1, 2, 3, 5):
        got = basis.copy()
        native.rotate_basis(target, threads, dtype, bits(got), rotation, used, kept)
        first = got if first is None else first
        assert same(got, first)
    assert same(first[kept:], basis[kept:])
    if kept:
        eps = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-9, "float16": 2.0**-11}
        error = np.linalg.norm(first[:kept].astype(np.float64) - want, axis=1)
        assert (error <= 4 * eps[dtype] * np.linalg.norm(want, axis=1)).all()


@pytest.mark.parametrize("rows,n", [(0, 5), (4, 0), (0, 0)])
def test_rotation_of_nothing(cpu_target, rows, n):
    basis = np.zeros((rows, n), np.float32)
    native.rotate_basis(cpu_target, 2, "float32", basis, np.eye(rows), rows, rows)


def test_rotation_of_no_rows_that_are_used(target, rng):
    basis = rng.normal(size=(4, 100)).astype(np.float32)
    got = basis.copy()
    native.rotate_basis(target, 2, "float32", got, np.eye(4), 0, 0)
    assert np.array_equal(got, basis)
