"""What the certificate measures of rows and their products, against extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.device import programs, storage
from curvax.ops.dtypes import compute_dtype
from curvax.program import Clock, host

N = 70_003
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def basis_of(rows, dtype):
    """Rows in storage, behind as many others."""
    n = rows.shape[1]
    basis = np.full(storage.shape(2 * len(rows), n, dtype), np.nan)
    basis[len(rows) :, :n] = rows * storage.scale(dtype, n)
    return host(basis.astype(jnp.dtype(dtype)))


def measured(basis, products, start, following, thetas, coupling):
    places = host(np.int32(start)), host(np.int32(following))
    small = host(np.asarray(thetas)), host(np.asarray(coupling))
    out = programs.residuals(Clock(), basis, host(products), *places, *small)
    return [np.asarray(x) for x in out]


def truth(x, q, w, thetas, coupling):
    """In extended precision, with the Rayleigh quotient's own residual."""
    x, q, w, thetas, coupling = (np.asarray(a, np.longdouble) for a in (x, q, w, thetas, coupling))
    squares = np.sum(x * x, axis=1)
    quotients = np.sum(x * w, axis=1) / squares
    rest, error = w - quotients[:, None] * x, w - thetas[:, None] * x - coupling.T @ q
    norms = np.sqrt(np.sum(rest * rest, axis=1) / squares)
    return quotients, norms, np.sqrt(np.sum(error * error, axis=1))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_residuals_and_errors(dtype, b, implementation, rng, monkeypatch):
    """Of residuals over nine orders of magnitude, with θ next to λ or nowhere near it."""
    monkeypatch.setenv("CURVAX_IMPL", implementation)
    basis = basis_of(rng.standard_normal((2 * b, N)) / N**0.5, dtype)
    scale = storage.scale(dtype, N)
    x, q = np.asarray(basis)[2 * b :, :N].astype(np.float64).reshape(2, b, N) / scale
    compute = np.float64 if dtype == "float64" else np.float32
    values, coupling = np.linspace(3, 4, b), rng.standard_normal((b, b))
    for size in (1.0, 1e-4, 1e-9) if compute == np.float64 else (1.0, 1e-4):
        w = (values[:, None] * x + size * (coupling.T @ q)).astype(compute)
        for thetas in (values * (1 + size**2), values + size, np.zeros(b)):
            got = measured(basis, w, 2 * b, 3 * b, thetas, size * coupling)
            want = truth(x, q, w, thetas, size * coupling)
            # The error is what is left of w, whose digits θ x and the coupling take away.
            for value, exact, below in zip(got, want, (0, 0, 1e-15), strict=True):
                np.testing.assert_allclose(
                    value, exact.astype(np.float64), rtol=1e-11, atol=1e-12 * below + 1e-15
                )


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_residual_far_below_the_error_of_the_ritz_value(implementation, rng, monkeypatch):
    """The squares of w − θ x and of its part along x agree in all digits: neither may be used."""
    monkeypatch.setenv("CURVAX_IMPL", implementation)
    x, other = np.linalg.qr(rng.standard_normal((N, 2)))[0].T
    basis = basis_of(np.stack([x, other]), "float64")
    for size in (1e-6, 1e-10, 1e-13):
        w = (7 * x + size * other)[None]
        for theta in (0.0, 7 + 1e-3, 7 + 1e-7):
            got = measured(basis, w, 2, 3, [theta], [[0.0]])
            want = truth(x[None], other[None], w, [theta], [[0.0]])
            # Rounding w leaves 1e-16 of each element.
            np.testing.assert_allclose(got[1], want[1].astype(float), rtol=1e-9, atol=1e-15)
            np.testing.assert_allclose(got[0], want[0].astype(float), rtol=1e-15)


def test_the_distance_of_arrays_that_nearly_agree(rng):
    a = rng.standard_normal((2, N)).astype(np.float32)
    b = a + rng.integers(-1, 2, a.shape).astype(np.float32) * np.float32(2.0**-20)
    wide = a.astype(np.longdouble) - b
    got = float(programs.squared_distance(Clock(), host(a), host(b)))
    assert abs(got - np.sum(wide * wide)) <= 1e-14 * np.sum(wide * wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_certificate_reads_its_vectors_once(dtype, native_kernels):
    """One sweep, and one that waits for a Ritz value that is far off; no loop and copy of XLA's."""
    b, zero = 2, np.int32(0)
    basis = jax.ShapeDtypeStruct(storage.shape(9, N, dtype), jnp.dtype(dtype))
    block = jax.ShapeDtypeStruct((b, N), compute_dtype(jnp.dtype(dtype)))
    with jax.enable_x64(True):
        call = jax.jit(programs.residuals.fun)
        compiled = call.lower(basis, block, zero, zero, np.zeros(b), np.zeros((b, b))).compile()
    text = compiled.as_text()
    sweeps = text.count('custom_call_target="curvax.residual_products"')
    assert sweeps == 2 and text.count(" conditional(") == 1 and " while(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < N
