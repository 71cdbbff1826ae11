"""The softmax_ce kernels against NumPy in float64, at every CPU target of this machine."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

native = pytest.importorskip("curvax_native_tests")

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Two roundings of the storage type, or a few of the compute type.
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(params=[*native.targets(), *native.emulated()])
def target(request):
    return request.param


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def offset(x: np.ndarray, elements: int) -> np.ndarray:
    """A copy of ``x`` whose data start `elements` elements after an aligned address."""
    raw = np.zeros(x.size + elements, x.dtype)
    raw[elements:] = x.ravel()
    return raw[elements:].reshape(x.shape)


def expected(z, u, labels, weights, softcap, z_loss, smoothing, ignore):
    """The equations, in float64: loss, lse, gradient, products."""
    z, u, w = (np.asarray(x, np.float64) for x in (z, u, weights))
    vocab = z.shape[1]
    slope = np.ones_like(z)
    if softcap:
        z = softcap * np.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    top = z.max(1, keepdims=True)
    e = np.exp(z - top)
    lse = top + np.log(e.sum(1, keepdims=True))
    p = np.exp(z - lse)
    target = (1 - smoothing) * np.eye(vocab)[np.clip(labels, 0, vocab - 1)] + smoothing / vocab
    kappa = 1 + 2 * z_loss * lse
    with np.errstate(invalid="ignore"):
        share = np.where(target == 0, 0.0, target * z)
    loss = lse[:, 0] - share.sum(1) + z_loss * lse[:, 0] ** 2
    g = w[:, None] * (kappa * p - target)
    tangent = slope * u
    mu = (p * tangent).sum(-1, keepdims=True)
    product = w[:, None] * p * (kappa * (tangent - mu) + 2 * z_loss * mu)
    if softcap:
        product = slope * product - 2 * z / softcap**2 * tangent * g
    keep = labels != ignore
    return (
        np.where(keep, loss, 0),
        np.where(keep, lse[:, 0], 0),
        np.where(keep[:, None], slope * g, 0),
        np.where(keep[:, None], product, 0),
    )


def run(target, threads, dtype, z, u, labels, weights, options, full=True):
    """Calls the kernel in place; returns loss, lse, gradient, products."""
    z, u = z.copy(), u.copy()
    loss, lse = np.full(len(z), 7, weights.dtype), np.full(len(z), 7, weights.dtype)
    extra = (bits(z), loss, lse) if full else (None, None, None)
    native.softmax_ce(
        target, threads, dtype, bits(z), bits(u), labels, weights, bits(u), *extra, *options
    )
    return loss, lse, z, u


def make(rng, dtype, rows, vocab, tangents, size=3.0):
    storage = DTYPES[dtype]
    z = (size * rng.normal(size=(rows, vocab))).astype(storage)
    u = rng.normal(size=(tangents, rows, vocab)).astype(storage)
    labels = rng.integers(0, vocab, rows).astype(np.int32)
    compute = np.float64 if dtype == "float64" else np.float32
    return z, u, labels, rng.uniform(0.1, 1, rows).astype(compute)


def check(got, want, dtype, scale_of=0.0):
    for name, a, b in zip(("loss", "lse", "gradient", "products"), got, want, strict=True):
        compute = "float32" if dtype == "bfloat16" and name in ("loss", "lse") else dtype
        size = np.abs(b).max(initial=scale_of)
        bound = 16 * EPS[compute] * size
        error = np.abs(np.asarray(a, np.float64) - b).max(initial=0)
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


OPTIONS = [
    (0.0, 0.0, 0.0, -100),
    (30.0, 0.0, 0.0, -100),
    (0.0, 1e-2, 0.0, -100),
    (0.0, 0.0, 0.1, -100),
    (5.0, 1e-2, 0.1, 3),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equations(target, dtype, options, rng):
    z, u, labels, weights = make(rng, dtype, 5, 2311, 3)
    labels[1] = options[3] if options[3] > 0 else -100
    got = run(target, 2, dtype, z, u, labels, weights, options)
    check(got, expected(z, u, labels, weights, *options), dtype)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(1, 9),
    vocab=st.integers(1, 1100),
    tangents=st.integers(0, 3),
    shift=st.integers(0, 5),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    option=st.sampled_from(OPTIONS),
    seed=st.integers(0, 2**31),
    full=st.booleans(),
)
def test_any_shape_and_alignment(dtype, rows, vocab, tangents, shift, size, option, seed, full):
    rng = np.random.default_rng(seed)
    z, u, labels, weights = make(rng, dtype, rows, vocab, tangents, size)
    z, u = offset(z, shift), offset(u, shift)
    option = option[:3] + (-100,)
    want = expected(z, u, labels, weights, *option)
    for target in native.targets():
        got = run(target, 2, dtype, z, u, labels, weights, option, full)
        # exp turns a rounding of its argument, relative to |z|, into a relative error of p.
        size_of = max(1.0, np.abs(z.astype(np.float64)).max(), np.abs(want[0]).max())
        if full:
            check(got, want, dtype, scale_of=size_of)
        elif tangents:
            error = np.abs(got[3].astype(np.float64) - want[3]).max()
            assert error <= 16 * EPS[dtype] * size_of


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_thread_count(target, dtype, rng):
    z, u, labels, weights = make(rng, dtype, 37, 4099, 2)
    first = run(target, 1, dtype, z, u, labels, weights, OPTIONS[4])
    for threads in (2, 3, 5):
        other = run(target, threads, dtype, z, u, labels, weights, OPTIONS[4])
        for a, b in zip(first, other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_rows_of_products_sum_to_zero(target, rng):
    z, u, labels, weights = make(rng, "float32", 4, 5003, 1)
    products = run(target, 1, "float32", z, u, labels, weights, OPTIONS[0], full=False)[3]
    total = products.astype(np.float64).sum(-1)
    size = np.abs(products).astype(np.float64).sum(-1)
    assert (np.abs(total) <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_exactly_absent(target, dtype, rng):
    z, u, labels, weights = make(rng, dtype, 3, 3000, 1)
    gone = np.zeros(3000, bool)
    gone[rng.permutation(3000)[:1700]] = True
    gone[1024:2048] = True  # a whole block of the sweep
    gone[labels] = False
    z[:, gone] = -np.inf
    loss, lse, grad, products = run(target, 2, dtype, z, u, labels, weights, OPTIONS[0])
    assert (products[..., gone] == 0).all()
    assert (grad[:, gone] == 0).all()
    want = expected(z[:, ~gone], u[..., ~gone], labels * 0, weights, *OPTIONS[0])
    assert np.allclose(lse, want[1], rtol=16 * EPS[dtype], atol=16 * EPS[dtype])
    error = np.abs(products[..., ~gone].astype(np.float64) - want[3]).max()
    assert error <= 16 * EPS[dtype] * np.abs(want[3]).max()
    assert np.isfinite(loss).all()


def test_ignored_rows_and_zero_weights_are_exact_zeros(target, rng):
    z, u, labels, weights = make(rng, "float32", 4, 700, 2)
    labels[0] = -100
    weights[2] = 0
    z[0, 5] = np.nan
    z[2, 5] = np.inf
    products = run(target, 1, "float32", z, u, labels, weights, OPTIONS[0], full=False)[3]
    assert (products[:, [0, 2]] == 0).all()
    assert np.isfinite(products).all() and (products[:, 1] != 0).any()
    loss, lse, grad, products = run(target, 1, "float32", z, u, labels, weights, OPTIONS[0])
    assert loss[0] == lse[0] == 0 and (grad[0] == 0).all() and (products[:, 0] == 0).all()


def test_label_outside_the_vocabulary_poisons_its_row(target, rng):
    z, u, labels, weights = make(rng, "float32", 3, 50, 1)
    labels[:] = [4, 50, -1]
    loss, _, grad, products = run(target, 1, "float32", z, u, labels, weights, OPTIONS[0])
    assert np.isnan(loss[1:]).all() and np.isfinite(loss[0])
    assert np.isnan(products[0, 1:]).all() and np.isfinite(products[0, 0]).all()
    assert np.isnan(grad[1:]).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_do_not_overflow(target, size, rng):
    z, u, labels, weights = make(rng, "float32", 3, 999, 1, size)
    got = run(target, 1, "float32", z, u, labels, weights, OPTIONS[0])
    check(got, expected(z, u, labels, weights, *OPTIONS[0]), "float32", scale_of=1.0 * size)
    assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize("rows,vocab,tangents", [(0, 7, 2), (0, 7, 0), (3, 7, 0), (0, 0, 0)])
def test_zero_extents(target, rows, vocab, tangents, rng):
    z, u = np.ones((rows, vocab), np.float32), np.ones((tangents, rows, vocab), np.float32)
    labels, weights = np.zeros(rows, np.int32), np.ones(rows, np.float32)
    loss, lse, gradient, products = run(target, 2, "float32", z, u, labels, weights, OPTIONS[0])
    assert products.shape == u.shape
    if rows:
        np.testing.assert_allclose(loss, np.log(vocab), rtol=1e-6)
        np.testing.assert_allclose(gradient, 1 / vocab - np.eye(vocab)[labels], rtol=1e-6)
