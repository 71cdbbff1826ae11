"""block_ortho in JAX: both implementations, in memory of their own and in donated memory."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import _native
from curvax.ops.block_ortho import orthonormalize_block, padded_length, rotate_basis

ORTHOGONALITY = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 1e-2, "float16": 1e-3}
IDENTITY = {"float32": 3e-6, "float64": 1e-14, "bfloat16": 1e-2, "float16": 1e-3}


def orthonormal(rng, rows, n):
    return np.linalg.qr(rng.normal(size=(n, rows)))[0].T


def basis_of(q, spare, dtype, scale=1.0):
    """Rows ``q`` in storage, and `spare` rows of NaN that must never be read."""
    full = np.full((len(q) + spare, q.shape[1]), np.nan)
    full[: len(q)] = q * scale
    return jnp.asarray(full.astype(jnp.dtype(dtype)))


def run(impl, basis, w, used, **options):
    call = jax.jit(functools.partial(orthonormalize_block, impl=impl, **options))
    compute = jnp.float64 if basis.dtype == jnp.float64 else jnp.float32
    out = call(basis, jnp.asarray(w, compute), jnp.int32(used), jnp.array([4, 0], jnp.uint32))
    return [np.asarray(x) for x in out]


def check(basis, w, c, s, used, dtype, scale=1.0):
    b = len(w)
    q = basis.astype(np.float64) / scale
    new = q[used : used + b]
    error = np.abs(np.hstack([new @ q[:used].T, new @ new.T - np.eye(b)])).max()
    assert error <= ORTHOGONALITY[dtype]
    assert np.isnan(q[used + b :]).all()
    assert (c[used:] == 0).all() and (np.tril(s, -1) == 0).all()
    w = np.asarray(w, np.float64)
    rest = np.linalg.norm(c[:used].T @ q[:used] + s.T @ new - w, axis=1)
    assert (rest <= IDENTITY[dtype] * np.linalg.norm(w, axis=1)).all()


@pytest.mark.thin(5)
@pytest.mark.parametrize("dtype", ORTHOGONALITY)
@pytest.mark.parametrize(("used", "b", "n"), [(0, 3, 700), (11, 1, 700), (20, 4, 3001)])
def test_random_block(impl, dtype, used, b, n, rng):
    scale = n**0.5 if dtype == "float16" else 1.0
    w = np.float32(rng.normal(size=(b, n)))
    q = orthonormal(rng, used, n) if used else np.zeros((0, n))
    with jax.enable_x64(dtype == "float64"):
        basis, c, s, info = run(impl, basis_of(q, b + 2, dtype, scale), w, used, scale=scale)
    check(basis, w, c, s, used, dtype, scale)
    assert info[0] <= 3 and info[1] == 0


@pytest.mark.parametrize("dtype", ORTHOGONALITY)
def test_lazy(impl, dtype, rng):
    used, b, n = 11, 3, 3001
    arithmetic = "float64" if dtype == "float64" else "float32"
    below = max(4 * jnp.finfo(arithmetic).eps, jnp.finfo(dtype).eps / 16)
    q, w = orthonormal(rng, used, n), np.float32(rng.normal(size=(b, n)))
    with jax.enable_x64(dtype == "float64"):
        basis = basis_of(q, b + 1, dtype)
        full = run(impl, basis, w, used)
        lazy = run(impl, basis, w, used, reorthogonalize="lazy")
    check(lazy[0], w, *lazy[1:3], used, dtype)
    assert 0 < lazy[3][2] < below
    assert list(lazy[3][:2]) == list(full[3][:2]) == [2, 0]
    # C is that of the first update alone: what it left is not subtracted.
    assert 0 < np.abs(lazy[1] - full[1]).max() <= below * np.linalg.norm(w, axis=1).max()


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", ORTHOGONALITY)
def test_padded_rows(impl, dtype, rng):
    """The vocabulary of GPT-2: rows of 50257 are not aligned, padded ones are."""
    used, b, n = 5, 2, 50257
    columns = padded_length(n, dtype)
    q, w = orthonormal(rng, used, n), np.float32(rng.normal(size=(b, n)))
    padded = np.full((used + b + 1, columns), np.nan)
    padded[:used, :n] = q
    with jax.enable_x64(True):
        plain = run(impl, basis_of(q, b + 1, dtype), w, used)
        basis, c, s, _ = run(impl, jnp.asarray(padded.astype(jnp.dtype(dtype))), w, used)
    check(basis[:, :n], w, c, s, used, dtype)
    assert (basis[used : used + b, n:] == 0).all()
    eps = float(jnp.finfo("float64" if dtype == "float64" else "float32").eps)
    np.testing.assert_allclose(c, plain[1], atol=8 * eps * np.linalg.norm(w, axis=1).max())


@pytest.mark.parametrize(
    ("n", "dtype", "columns"),
    [(50257, "float32", 50272), (50257, "bfloat16", 50304), (33, "float64", 48), (64, "half", 64)],
)
def test_padded_length(n, dtype, columns):
    assert padded_length(n, dtype) == columns
    assert columns * jnp.dtype(dtype).itemsize % 128 == 0 and 0 <= columns - n < 128


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", object])
def test_padded_length_is_of_a_basis(dtype):
    with pytest.raises(ValueError, match="dtype must be float32, float64, bfloat16 or float16"):
        padded_length(100, dtype)
    assert padded_length(np.int8(127), "float32") == 128


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_near_the_ends_of_the_range(impl, scale, rng):
    q, w = orthonormal(rng, 5, 3001), np.float32(rng.normal(size=(2, 3001)))
    basis, c, s, info = run(impl, basis_of(q, 3, "float32", scale), w, 5, scale=scale)
    check(basis, w, c, s, 5, "float32", scale)


@pytest.mark.parametrize("x64", [False, True])
def test_small_matrices_are_float64(impl, x64, rng):
    w = np.float32(rng.normal(size=(2, 100)))
    with jax.enable_x64(x64):
        out = run(impl, basis_of(orthonormal(rng, 5, 100), 3, "float32"), w, 5)
    expected = np.float64 if x64 or impl == "ffi" else np.float32
    assert {x.dtype for x in out[1:]} == {np.dtype(expected)}
    assert out[0].dtype == np.float32


@pytest.mark.thin(5)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "replaced"), [("condition", 0), ("dependent", 2), ("span", 4), ("zero", 4)]
)
def test_dependent_directions(impl, dtype, name, replaced, rng):
    used, b, n = 15, 4, 1203
    q = orthonormal(rng, used, n)
    random = rng.normal(size=(b, n))
    blocks = {
        "condition": (orthonormal(rng, b, b) * np.logspace(0, -3, b)) @ orthonormal(rng, b, n),
        "dependent": np.stack([random[0], random[1], random[0] - random[1], 0 * random[0]]),
        "span": rng.normal(size=(b, used)) @ q,
        "zero": 0 * random,
    }
    w = np.asarray(blocks[name], dtype)
    with jax.enable_x64(True):
        basis, c, s, info = run(impl, basis_of(q, b + 1, dtype), w, used)
    check(basis, w, c, s, used, dtype)
    assert info[1] == replaced and info[0] <= 6
    assert (np.abs(s).max(1) == 0).sum() == replaced


def test_the_kernel_and_the_reference_decide_alike(native_kernels, rng):
    """But for columns whose square is between the smallest that each can measure."""
    used, b, n = 15, 4, 1203
    q, alone = orthonormal(rng, used, n), orthonormal(rng, b, n)
    mixed = rng.normal(size=(b, used)) @ q
    mixed /= np.linalg.norm(mixed, axis=1)[:, None]
    calls = [jax.jit(functools.partial(orthonormalize_block, impl=i)) for i in ("ffi", "reference")]
    for size in (1e-1, 1e-2, 1e-6, 0):
        near_each_other = np.stack([*alone[:3], alone[0] + size * alone[3]])
        for w in (mixed + size * alone, near_each_other):
            with jax.enable_x64(True):
                basis, block = basis_of(q, b + 1, "float32"), jnp.asarray(w, jnp.float32)
                given = basis, block, jnp.int32(used), jnp.array([4, 0], jnp.uint32)
                kernel, plain = (call(*given)[3] for call in calls)
            # Passes, and directions replaced.
            np.testing.assert_array_equal(kernel[:2], plain[:2], err_msg=f"size {size}")


@pytest.mark.thin(5)
@pytest.mark.parametrize("exponent", [-46, 46, 100])
def test_only_relative_sizes_matter(impl, exponent, rng):
    used, b, n = 9, 3, 800
    q = orthonormal(rng, used, n)
    w = np.float32(rng.normal(size=(b, n)))
    w[2] = w[0]
    with jax.enable_x64(True):
        one = run(impl, basis_of(q, b, "float32"), w, used)
        other = run(impl, basis_of(q, b, "float32"), np.ldexp(w, exponent), used)
    assert list(one[3][:2]) == list(other[3][:2]) and one[3][1] == 1
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)
    size = np.abs(one[2]).max()
    np.testing.assert_allclose(np.ldexp(other[1], -exponent), one[1], atol=1e-6 * size)
    np.testing.assert_allclose(np.ldexp(other[2], -exponent), one[2], atol=1e-6 * size)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_block(impl, bad, rng):
    w = np.float32(rng.normal(size=(2, 90)))
    w[1, 3] = bad
    out = run(impl, basis_of(orthonormal(rng, 4, 90), 2, "float32"), w, 4)
    assert np.isnan(out[3][2]) and np.isnan(out[0][4:6]).all() and np.isnan(out[2]).all()
    assert np.isfinite(out[0][:4]).all()


def test_one_program_for_all_steps_and_no_copy(native_kernels, rng):
    """Donated, the basis is aliased from end to end, in a loop over steps too."""
    rows, b, n = 24, 2, 5000
    block = jnp.asarray(rng.normal(size=(b, n)), jnp.float32)

    def steps(basis, block):
        def step(i, carry):
            basis, total = carry
            used = (2 * i).astype(jnp.int32)
            basis, c, _, _ = orthonormalize_block(basis, block + total, used, 1, impl="ffi")
            return basis, total + jnp.sum(c).astype(jnp.float32)

        return jax.lax.fori_loop(0, 6, step, (basis, jnp.float32(0)))[0]

    with jax.enable_x64(True):
        compiled = jax.jit(steps, donate_argnums=0).lower(jnp.zeros((rows, n), jnp.float32), block)
        text = compiled.compile().as_text()
    assert "input_output_alias={ {}: (0" in text
    assert not re.findall(rf"f32\[{rows},{n}\]\S* copy\(", text)

    def single(basis, block, used):
        return orthonormalize_block(basis, 2 * block, used, 1, impl="ffi")

    call = jax.jit(single, donate_argnums=0)
    text = call.lower(jnp.zeros((rows, n)), block, jnp.int32(0)).compile().as_text()
    assert not re.findall(rf"f32\[{rows},{n}\]\S* copy\(", text)


def test_operands_that_are_not_donated_keep_their_values(native_kernels, rng):
    basis = basis_of(orthonormal(rng, 4, 300), 3, "float32")
    block = jnp.asarray(rng.normal(size=(2, 300)), jnp.float32)
    before = np.asarray(basis).copy(), np.asarray(block).copy()
    orthonormalize_block(basis, block, 4, 0, impl="ffi")
    np.testing.assert_array_equal(basis, before[0])
    np.testing.assert_array_equal(block, before[1])


def test_runtime_count_out_of_range(native_kernels, rng):
    """An error on a CPU. A CUDA device cannot raise: the basis stays, all else is NaN."""
    basis = basis_of(orthonormal(rng, 4, 300), 3, "float32")
    block = jnp.zeros((2, 300))
    before = np.asarray(basis).copy()

    def call():
        return jax.block_until_ready(
            orthonormalize_block(basis, block, jnp.int32(6), 0, impl="ffi")
        )

    if _native.platform() == "cuda":
        got, c, s, info = (np.asarray(x) for x in call())
        np.testing.assert_array_equal(got, before)
        assert np.isnan(c).all() and np.isnan(s).all() and np.isnan(info[2])
        return
    with pytest.raises(
        (ValueError, jax.errors.JaxRuntimeError), match="used 6, b 2, rows 7, n 300"
    ):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": jnp.zeros(3)}, r"^basis must.*\(rows, columns\), at least 1 each, got \(3,\)"),
        ({"basis": jnp.zeros((5, 40), jnp.int32)}, "^basis must.*got dtype int32"),
        ({"block": jnp.zeros((2, 41))}, r"^block must.*\(b, n\).*n <= 40.*got \(2, 41\)"),
        ({"block": jnp.zeros((2, 0))}, r"^block must.*1 <= n.*got \(2, 0\)"),
        ({"block": jnp.zeros((2, 40), jnp.bfloat16)}, "^block must.*float32, got bfloat16"),
        (
            {"block": jnp.zeros((2, 3)), "used": 2},
            r"^used must.*\[0, min\(rows, n\) - b = 1\], got 2",
        ),
        ({"used": 4}, r"^used must.*\[0, min\(rows, n\) - b = 3\], got 4"),
        ({"used": jnp.float32(1)}, "^used must.*int32 scalar"),
        ({"seed": jnp.zeros(3)}, "^seed must.*uint32"),
        ({"scale": 0.0}, "^scale must.*positive"),
        ({"scale": np.inf}, "^scale must.*positive and finite"),
        ({"scale": 1e300}, r"^scale must.*in \[9.9e-32, 1e\+31\] .* float32 .*, got 1e\+300"),
        ({"scale": 1e-300}, "^scale must.*got 1e-300"),
        ({"scale": 7e4, "basis": jnp.zeros((5, 40), "half")}, r"^scale must.*6.6e\+04\].*float16"),
        ({"reorthogonalize": ["lazy"]}, "^reorthogonalize must be one of \\('full', 'lazy'\\)"),
        ({"reorthogonalize": "no"}, "^reorthogonalize must.*'full', 'lazy'.*got 'no'"),
        ({"impl": "fast"}, "^impl must.*'fast'"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"basis": jnp.zeros((5, 40)), "block": jnp.zeros((2, 40)), "used": 1, "seed": 0}
    with pytest.raises((TypeError, ValueError), match=message):
        orthonormalize_block(**(arguments | change))


@pytest.mark.parametrize("dtype", ORTHOGONALITY)
def test_rotation(impl, dtype, rng):
    used, kept, rows, n = 13, 6, 16, 2001
    basis = rng.normal(size=(rows, n))
    basis[used:] = np.nan
    rotation = np.full((rows, rows), np.nan)
    rotation[:used, :used] = orthonormal(rng, used, used)
    with jax.enable_x64(True):
        q = jnp.asarray(basis.astype(jnp.dtype(dtype)))
        call = jax.jit(functools.partial(rotate_basis, impl=impl))
        out = np.asarray(call(q, rotation, jnp.int32(used), jnp.int32(kept)), np.float64)
    q = np.asarray(q, np.float64)
    want = rotation[:used, :kept].T @ q[:used]
    eps = float(jnp.finfo(dtype).eps)
    error = np.linalg.norm(out[:kept] - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() <= 4 * eps
    np.testing.assert_array_equal(out[kept:], q[kept:])


def test_rotation_is_in_place(native_kernels):
    with jax.enable_x64(True):
        call = jax.jit(functools.partial(rotate_basis, impl="ffi"), donate_argnums=0)
        arguments = (jnp.zeros((8, 999), jnp.float32), jnp.eye(8), jnp.int32(8), jnp.int32(3))
        compiled = call.lower(*arguments).compile()
    assert "input_output_alias={ {}: (0" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 999 * 4


def test_rotation_wrong_arguments():
    with pytest.raises(ValueError, match="enable_x64"):
        rotate_basis(jnp.zeros((4, 9)), np.eye(4), 4, 2)
    with jax.enable_x64(True):
        basis = jnp.zeros((4, 9), jnp.float32)
        with pytest.raises(ValueError, match=r"^rotation must.*\(4, 4\) and dtype float64"):
            rotate_basis(basis, np.eye(4, dtype=np.float32), 4, 2)
        with pytest.raises(ValueError, match=r"^used must.*got 5"):
            rotate_basis(basis, np.eye(4), 5, 2)
        with pytest.raises(ValueError, match=r"^kept must.*used = 2.*got 3"):
            rotate_basis(basis, np.eye(4), 2, 3)
