"""Operators at the ends of the floating-point range: scaled, or refused with the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import curvax as cx
from curvax.krylov.scaling import InRange, _search
from curvax.results.units import rescaled

N = 40
VALUES = np.concatenate([[1.0, -0.9, 0.8, -0.7], np.linspace(-0.3, 0.3, N - 4)])
SINGLE = [1e-37, 1e-36, 1e-30, 1e30, 1e37, 3e38]
DOUBLE = [1e-300, 1e-200, 1e200, 1e300]


def _matrix(size, dtype=np.float64):
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    a = (q * VALUES) @ q.T
    # In steps: one factor alone may be below the smallest normal number.
    return ((a + a.T) / 2 * size).astype(dtype)


def _diagonal(size, dtype=np.float32):
    d = (VALUES * size).astype(dtype)
    return cx.from_matvec(lambda v: d * v, jax.ShapeDtypeStruct((N,), dtype))


def _check(result, size, tol, floor):
    """The largest four, each within its bound, and bounds that scale with the operator."""
    np.testing.assert_allclose(
        np.sort(result.eigenvalues / size), np.sort(VALUES[:4]), atol=5 * floor
    )
    assert result.all_converged
    assert np.all(result.residuals <= tol * size)
    error = np.abs(np.sort(result.eigenvalues) - np.sort(VALUES[:4] * size))
    assert np.all(error <= np.max(result.bounds) + floor * size)
    np.testing.assert_array_equal(result.bounds, result.residuals)


@pytest.mark.parametrize("size", SINGLE)
@pytest.mark.parametrize("basis", [None, 24])
def test_dense_arrays(size, basis):
    result = cx.eigsh(_matrix(size, np.float32), 4, seed=0, max_basis=basis, tol=1e-4)
    _check(result, size, 1e-4, 1e-6)
    assert np.all(result.residuals > 1e-9 * size)
    assert result.noise < 1e-5 and np.all(result.tol_effective == 1e-4)


@pytest.mark.parametrize("size", [1e-40, 1e-44])
def test_dense_arrays_below_the_smallest_normal_number(size):
    """The entries are those of float32, whatever few digits these have left."""
    a = _matrix(size, np.float32)
    truth = np.linalg.eigvalsh(a.astype(np.float64) / size)
    result = cx.eigsh(a, 2, seed=0, which="LA")
    np.testing.assert_allclose(result.eigenvalues / size, truth[:-3:-1], rtol=1e-5)


@pytest.mark.thin(4)
@pytest.mark.parametrize("size", DOUBLE)
@pytest.mark.parametrize("basis", [None, 24])
def test_float64(size, basis):
    with jax.enable_x64(True):
        result = cx.eigsh(_matrix(size), 4, seed=0, max_basis=basis, tol=1e-10)
        _check(result, size, 1e-10, 1e-13)
        assert np.all(result.residuals > 1e-18 * size)
        result = cx.eigsh(_diagonal(size, np.float64), 4, seed=0, max_basis=basis, tol=1e-10)
        _check(result, size, 1e-10, 1e-13)


@pytest.mark.thin(4)
@pytest.mark.parametrize("size", SINGLE)
@pytest.mark.parametrize("certify", ["sampled", "complete"])
def test_lanczos_of_a_function(size, certify):
    # Only values of which none is denormal.
    d = jnp.asarray(np.append(VALUES[:4], np.linspace(0.2, 0.3, N - 4)) * size, jnp.float32)
    op = cx.from_matvec(lambda v: d * v, N)
    result = cx.eigsh(op, 4, seed=0, max_basis=24, tol=1e-4, certify=certify)
    _check(result, size, 1e-3, 1e-5)
    assert result.complete is (True if certify == "complete" else None)


@pytest.mark.parametrize("size", [1e-36, 1e37])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_bases(size, dtype):
    a = _matrix(size, np.float32)
    result = cx.eigsh(a, 4, seed=0, max_basis=24, tol=1e-2, basis_dtype=dtype)
    _check(result, size, 1e-2, 1e-4)


def test_the_scale_does_not_change_a_bit():
    """Powers of two, where nothing is rounded: the same numbers, times that."""
    a = jnp.asarray(_matrix(1.0), jnp.float32)
    op = cx.from_matvec(lambda v: jnp.matmul(a, v, precision="highest"), N)
    plain = cx.eigsh(op, 4, seed=0, max_basis=24)
    scaled = cx.eigsh(2.0**90 * op, 4, seed=0, max_basis=24)
    np.testing.assert_array_equal(scaled.eigenvalues, 2.0**90 * plain.eigenvalues)
    np.testing.assert_array_equal(scaled.residuals, 2.0**90 * plain.residuals)
    np.testing.assert_array_equal(scaled.eigenvectors, plain.eigenvectors)
    assert scaled.num_matvecs == plain.num_matvecs
    largest = [progress.largest for progress in scaled.history]
    assert largest == [2.0**90 * progress.largest for progress in plain.history]


def test_nothing_is_scaled_in_the_ordinary_case(monkeypatch):
    monkeypatch.setattr(InRange, "product", None)
    for size in (1e-15, 1.0, 1e15):
        _check(cx.eigsh(_diagonal(size), 4, seed=0, tol=1e-4, max_basis=24), size, 1e-4, 1e-5)
        _check(cx.eigsh(_matrix(size, np.float32), 4, seed=0), size, 1e-4, 1e-6)


def test_the_callback_sees_the_operator_that_was_asked_about():
    seen = []
    result = cx.eigsh(_diagonal(1e-33), 4, seed=0, max_basis=24, callback=seen.append)
    assert tuple(seen) == result.history
    assert 0.9e-33 < seen[-1].largest < 1.1e-33
    assert seen[0].matvecs == 1 and seen[-1].matvecs == result.num_matvecs


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_warm_starts(size):
    a = _matrix(size, np.float32)
    first = cx.eigsh(a, 2, which="LA", seed=0, max_basis=24)
    again = cx.eigsh(a, 2, which="LA", seed=0, max_basis=24, v0=first)
    np.testing.assert_allclose(again.eigenvalues, [size, 0.8 * size], rtol=1e-4)
    assert again.num_matvecs < first.num_matvecs


def test_a_start_without_a_product():
    """A start in the null space says nothing of the operator's size."""
    d = jnp.asarray(np.append(np.zeros(5), np.linspace(1, 2, 35)), jnp.float32)
    start = jnp.eye(40)[0]
    for factor in (1.0, 1e-36):
        op = cx.from_matvec(lambda v: d * v * factor, 40)  # noqa: B023
        result = cx.eigsh(op, 2, which="LA", v0=start, seed=0, max_basis=24)
        np.testing.assert_allclose(result.eigenvalues[0], 2 * factor, rtol=1e-4)


@pytest.mark.parametrize(("size", "basis"), [(1e-30, 24), (1e30, None)])
def test_hessian_of_a_scaled_loss(size, basis):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((20, 6), (20, 1)))
    params = {
        name: jnp.asarray(rng.normal(size=s), jnp.float32)
        for name, s in {"a": (6, 5), "b": (5, 1)}.items()
    }

    def loss(params, batch, factor):
        return factor * jnp.mean((jnp.tanh(batch[0] @ params["a"]) @ params["b"] - batch[1]) ** 2)

    plain = cx.eigsh(
        cx.hessian(lambda p, b: loss(p, b, 1.0), params, (x, y)), 3, seed=0, max_basis=basis
    )
    op = cx.hessian(lambda p, b: loss(p, b, size), params, (x, y))
    result = cx.eigsh(op, 3, seed=0, max_basis=basis)
    np.testing.assert_allclose(result.eigenvalues / size, plain.eigenvalues, rtol=1e-4)
    scale = np.abs(result.eigenvalues).max()
    assert result.all_converged and np.all(result.residuals <= 1e-3 * scale)


class TestRefused:
    """What is read as zero cannot be scaled."""

    def test_numbers_of_a_function(self):
        d = np.full(N, 1e-38, np.float32)
        for op in (
            cx.from_matvec(lambda v: d * v, N),
            cx.from_matvec(lambda v: 1e-38 * v, N),
            cx.from_matvec(lambda v: jnp.full(N, 1e-38) * v, N),
            1e-39 * cx.identity(N),
            # All but the largest: 0 would be a false eigenvalue.
            _diagonal(3e-38),
        ):
            with pytest.raises(FloatingPointError, match=r"underflows in float32.*power of two"):
                cx.eigsh(op, 2, seed=0)
        with pytest.raises(FloatingPointError, match=r"underflows in float32.*power of two"):
            cx.eigsh(_diagonal(1e-38), 2, seed=0, max_basis=24)

    @pytest.mark.parametrize("basis", [None, 24])
    def test_host_operators(self, basis):
        """SciPy's products are flushed only in the threads of XLA."""
        a = scipy.sparse.diags_array(np.linspace(1e-39, 1e-38, N).astype(np.float32))
        with pytest.raises(FloatingPointError, match="underflows in float32"):
            cx.eigsh(a, 2, seed=0, max_basis=basis)
        a = scipy.sparse.diags_array((np.linspace(2, 3, N) * 1e-37).astype(np.float32))
        result = cx.eigsh(a, 1, seed=0, max_basis=basis)
        np.testing.assert_allclose(result.eigenvalues, 3e-37, rtol=1e-4)

    def test_losses(self):
        for factor in (1e-38, 1e-37, 1e-36):
            op = cx.hessian(
                lambda p, b: factor * jnp.mean((b @ p) ** 2),  # noqa: B023
                jnp.ones(6),
                jnp.asarray(np.random.default_rng(0).normal(size=(30, 6)), jnp.float32),
            )
            with pytest.raises(FloatingPointError, match="the loss underflows in float32"):
                cx.eigsh(op, 2, seed=0)

    def test_float64(self):
        with jax.enable_x64(True):
            d = np.full(N, 1e-310)
            with pytest.raises(FloatingPointError, match="underflows in float64"):
                cx.eigsh(cx.from_matvec(lambda v: d * v, jax.ShapeDtypeStruct((N,), "f8")), 2)

    def test_only_numbers_that_matter(self):
        """A parameter below the smallest normal number does not forbid a small Hessian."""
        params = {"a": jnp.ones(4), "b": jnp.asarray(np.full(4, 1e-40, np.float32))}
        op = cx.hessian(
            lambda p, _: 1e-25 * jnp.sum(p["a"] ** 2 + p["b"] ** 2), params, jnp.ones(1)
        )
        result = cx.eigsh(op, 3, seed=0)
        np.testing.assert_allclose(result.eigenvalues, 2e-25, rtol=1e-5)


@pytest.mark.parametrize("basis", [None, 24])
def test_zero_operators_are_zero(basis):
    ops = (
        cx.hessian(lambda p, b: jnp.mean(b @ p), jnp.ones(N), jnp.ones((3, N))),
        cx.from_matvec(lambda v: 0 * v, N),
        0.0 * cx.identity(N),
    )
    for op in ops:
        result = cx.eigsh(op, 2, seed=0, max_basis=basis)
        assert result.all_converged
        np.testing.assert_array_equal(result.eigenvalues, 0)
        np.testing.assert_array_equal(result.residuals, 0)


def test_operators_that_are_not_finite_are_still_refused():
    for value in (np.nan, np.inf):
        op = cx.from_matvec(lambda v: v * value, N)  # noqa: B023
        for basis in (None, 24):
            with pytest.raises(FloatingPointError, match="product 1 of the operator is not finite"):
                cx.eigsh(op, 2, seed=0, max_basis=basis)


def test_values_beyond_the_range_are_refused():
    """No matrix of finite numbers has them."""
    op = cx.from_matvec(lambda v: v * 1e30 * 1e30, N)
    with pytest.raises(FloatingPointError, match="product 1 of the operator is not finite"):
        cx.eigsh(op, 2, seed=0, max_basis=24)
    # But the largest eigenvalue of finite numbers may be n times as large as they are.
    ones = np.full((N, N), 3e38, np.float32)
    for basis in (None, 24):
        result = cx.eigsh(ones, 1, which="LA", seed=0, max_basis=basis)
        np.testing.assert_allclose(result.eigenvalues, 3e38 * N, rtol=1e-5)


def test_casts_to_float16_leave_less_room():
    """A factor of 2**50 would overflow in float16."""

    def matvec(v):
        return 1e-30 * jnp.linspace(1, 2, N) * v.astype(jnp.float16).astype(jnp.float32)

    result = cx.eigsh(cx.from_matvec(matvec, N), 1, seed=0, which="LA", tol=1e-2)
    np.testing.assert_allclose(result.eigenvalues, 2e-30, rtol=1e-3)


def test_the_search_ends():
    def level(size, least=-126, most=128):
        def of(exponent):
            total = exponent + size
            if exponent >= most or total >= most:
                return float("nan")
            return float(total) if total > least else -float("inf")

        return of

    for size in (-140, -123, -90, 90, 128, 200):
        found = _search(level(size), 120)
        assert found is not None and abs(found + size / 2) <= 4 or (size, found) == (200, -100)
    for size in (-90, -123):  # float16
        assert 7 <= _search(level(size, most=15), 120) < 15
    assert _search(lambda _: float("nan"), 120) is None
    assert _search(lambda _: -float("inf"), 120) == 120


def test_tables_print_small_and_large_values():
    result = cx.eigsh(_matrix(1.0, np.float32), 2, which="LA", seed=0)
    for exponent, shown in ((-123, "9.40395e-38"), (127, "1.70141e+38")):
        table = str(rescaled(result, exponent)).splitlines()[1]
        assert abs(float(table.split()[1]) / float(shown) - 1) < 1e-5
        assert table.split()[-1] == "yes" and len(table.split()) == 7
