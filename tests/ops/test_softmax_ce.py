"""softmax_ce in JAX: both implementations against automatic differentiation in float64."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.ops.softmax_ce import softmax_ce_derivatives, softmax_ce_hvp

OPTIONS = [
    {},
    {"softcap": 20.0},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1, "ignore_index": 2},
]
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def problem(rng, dtype, rows=6, vocab=301, tangents=3):
    compute = jnp.float64 if dtype == "float64" else jnp.float32
    labels = rng.integers(0, vocab, rows)
    labels[:2] = [-100, 2]
    return (
        jnp.asarray(3 * rng.normal(size=(rows, vocab)), dtype),
        jnp.asarray(rng.normal(size=(tangents, rows, vocab)), dtype),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(rng.uniform(0.1, 1, rows), compute),
    )


def truth(z, u, labels, weights, softcap=None, z_loss=0.0, label_smoothing=0.0, ignore_index=-100):
    """Loss, lse, gradient and products by differentiating the loss itself, in float64."""
    keep = np.asarray(labels) != ignore_index
    keep &= np.asarray(labels) >= 0
    index = jnp.asarray(np.where(keep, labels, 0))

    def losses(logits):
        capped = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        lse = jax.nn.logsumexp(capped, axis=1)
        picked = jnp.take_along_axis(capped, index[:, None], axis=1)[:, 0]
        target = (1 - label_smoothing) * picked + label_smoothing * capped.mean(1)
        return jnp.where(jnp.asarray(keep), lse - target + z_loss * lse**2, 0.0), lse

    def total(logits):
        return jnp.sum(jnp.asarray(np.asarray(weights, np.float64)) * losses(logits)[0])

    with jax.enable_x64(True):
        z64, u64 = (jnp.asarray(np.asarray(x, np.float64)) for x in (z, u))
        loss, lse = losses(z64)
        hvp = [jax.jvp(jax.grad(total), (z64,), (x,))[1] for x in u64]
        out = (loss, jnp.where(jnp.asarray(keep), lse, 0.0), jax.grad(total)(z64), jnp.stack(hvp))
        return tuple(np.asarray(x) for x in out)


def assert_close(got, want, dtype, names, roundings=16):
    for name, a, b in zip(names, got, want, strict=True):
        compute = "float32" if dtype.endswith("16") and name in ("loss", "lse") else dtype
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error <= roundings * EPS[compute], f"{name}: relative error {error:.1e}"


def copied(text, *shapes):
    """Copies of arrays of one of these shapes in a compiled program."""
    return re.findall(rf"\w+\[({'|'.join(shapes)})\]\S* copy\(", text)


@pytest.mark.thin(5)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", EPS)
def test_derivatives_are_those_of_the_loss(impl, dtype, options, rng):
    with jax.enable_x64(dtype == "float64"):
        args = problem(rng, dtype)
        got = jax.jit(functools.partial(softmax_ce_derivatives, impl=impl, **options))(*args)
        hvp = softmax_ce_hvp(*args, impl=impl, **options)
        one = softmax_ce_hvp(args[0], args[1][1], *args[2:], impl=impl, **options)
    *got, hvp, one = (np.array(x) for x in (*got, hvp, one))
    if "ignore_index" in options:  # then -100 is a label like any other, and names no class
        assert all(np.isnan(np.asarray(x, np.float64)[..., 0, :]).all() for x in got[2:])
        for x in (*got, hvp, one):
            x[(..., 0, slice(None)) if x.ndim > 1 else 0] = 0
    want = truth(*args, **options)
    # XLA's own tanh, exp and log are approximations on a GPU.
    roundings = 32 if impl == "reference" and jax.default_backend() == "gpu" else 16
    assert_close(got, want, dtype, ("loss", "lse", "gradient", "products"), roundings)
    assert_close((hvp, one), (want[3], want[3][1]), dtype, ("products", "one product"), roundings)
    assert [x.dtype.name for x in got] == [args[3].dtype.name] * 2 + [dtype] * 2


def test_no_tangents(impl, rng):
    z, u, labels, weights = problem(rng, "float32")
    loss, _, grad, hvp = softmax_ce_derivatives(z, u[:0], labels, weights, impl=impl)
    want = truth(z, u, labels, weights)
    assert hvp.shape == (0, *z.shape)
    assert_close((loss, grad), (want[0], want[2]), "float32", ("loss", "gradient"))


def test_minus_infinity_and_ignored_rows(impl, rng):
    z, u, labels, weights = problem(rng, "float32")
    z = z.at[:, 40:90].set(-jnp.inf)
    labels = labels.at[2].set(1)
    _, _, grad, hvp = softmax_ce_derivatives(z, u, labels, weights, impl=impl)
    assert np.isfinite(grad[1:]).all() and np.isfinite(hvp).all()
    assert (hvp[:, :, 40:90] == 0).all() and (hvp[:, 0] == 0).all() and (grad[0] == 0).all()


def test_the_hessian_is_symmetric(impl, rng):
    z, u, labels, weights = problem(rng, "float32")
    hu = softmax_ce_hvp(z, u, labels, weights, softcap=10.0, z_loss=1e-2, impl=impl)
    gram = np.einsum("anv,bnv->ab", np.asarray(u, np.float64), np.asarray(hu, np.float64))
    assert np.abs(gram - gram.T).max() <= 1e-6 * np.abs(gram).max()


def test_vmap_over_tangents_and_over_everything(impl, rng):
    z, u, labels, weights = problem(rng, "float32")
    call = functools.partial(softmax_ce_hvp, impl=impl)
    want = call(z, u, labels, weights)
    mapped = jax.jit(jax.vmap(call, in_axes=(None, 0, None, None)))(z, u, labels, weights)
    np.testing.assert_allclose(mapped, want, atol=1e-6 * np.abs(want).max())
    zs = jnp.stack([z, 2 * z])
    both = jax.vmap(call, in_axes=(0, None, None, 0))(zs, u, labels, jnp.stack([weights] * 2))
    single = call(2 * z, u, labels, weights)
    np.testing.assert_allclose(both[1], single, atol=1e-6 * np.abs(single).max())


def test_products_are_written_over_donated_tangents(native_kernels, rng):
    args = problem(rng, "float32")
    call = jax.jit(functools.partial(softmax_ce_hvp, impl="ffi"), donate_argnums=1)
    text = call.lower(*args).compile().as_text()
    assert "input_output_alias={ {}: (1" in text
    assert not copied(text, "6,301", "3,6,301")
    z, u = np.asarray(args[0]), np.asarray(args[1])
    softmax_ce_hvp(*args, impl="ffi")  # not donated: the operands keep their values
    assert (np.asarray(args[0]) == z).all() and (np.asarray(args[1]) == u).all()


def test_derivatives_use_both_donated_operands(native_kernels, rng):
    args = problem(rng, "float32")
    call = jax.jit(lambda *a: softmax_ce_derivatives(*a, impl="ffi")[2:], donate_argnums=(0, 1))
    text = call.lower(*args).compile().as_text()
    assert not copied(text, "6,301", "3,6,301")
    # Nothing donated, both have to be copied.
    text = jax.jit(call.__wrapped__).lower(*args).compile().as_text()
    assert set(copied(text, "6,301", "3,6,301")) == {"6,301", "3,6,301"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": jnp.zeros((3,))}, r"^logits must.*shape \(N, V\), got \(3,\)"),
        ({"logits": jnp.zeros((6, 301), jnp.int32)}, "float32, float64, bfloat16 or float16"),
        ({"tangents": jnp.zeros((6, 300))}, r"^tangents must.*\(6, 301\) or \(b, 6, 301\)"),
        ({"tangents": jnp.zeros((6, 301), jnp.bfloat16)}, "^tangents must.*float32, got bfloat16"),
        ({"labels": jnp.zeros(6)}, "^labels must.*int32, got float32"),
        ({"weights": jnp.zeros(5)}, r"^weights must.*\(6,\), got \(5,\)"),
        ({"softcap": -1.0}, "^softcap must.*positive"),
        ({"label_smoothing": 2.0}, "^label_smoothing must.*in \\[0, 1\\]"),
        ({"softcap": np.inf}, "^softcap must be finite"),
        ({"softcap": 1e300}, r"^softcap must.*in \[1.1e-19, 1e\+31\] .* float32, got 1e\+300"),
        ({"softcap": 1e-20}, "^softcap must.*got 1e-20"),
        ({"z_loss": 1e300}, r"^z_loss must.*at most 3.4e\+38 .* float32, got 1e\+300"),
        ({"ignore_index": 2**40}, "^ignore_index must fit in 32 bits"),
        ({"softcap": True}, "^softcap must be a number"),
        ({"z_loss": np.inf}, "^z_loss must be finite"),
        ({"ignore_index": 1.0}, "^ignore_index must be an integer"),
        ({"impl": "cuda"}, "^impl must.*'cuda'"),
    ],
)
@pytest.mark.parametrize("function", [softmax_ce_hvp, softmax_ce_derivatives])
def test_wrong_arguments(function, change, message, rng):
    names = ("logits", "tangents", "labels", "weights")
    arguments = dict(zip(names, problem(rng, "float32"), strict=True)) | change
    with pytest.raises((TypeError, ValueError), match=message):
        function(**arguments)


def test_auto_obeys_the_environment(native_kernels, rng, monkeypatch):
    args = problem(rng, "float32")

    def lowered():
        return jax.jit(lambda *a: softmax_ce_hvp(*a)).lower(*args).as_text()

    assert "curvax.softmax_ce_hvp" in lowered()
    monkeypatch.setenv("CURVAX_IMPL", "reference")
    assert "curvax.softmax_ce_hvp" not in lowered()
    monkeypatch.setenv("CURVAX_IMPL", "fast")
    with pytest.raises(ValueError, match="CURVAX_IMPL"):
        lowered()


def test_a_kernel_asked_for_by_name_is_never_replaced(rng, monkeypatch):
    monkeypatch.setattr("curvax._native.loading.load", lambda platform: None)
    monkeypatch.setattr("curvax._native._warn_of_missing_cuda", lambda: None)
    with pytest.raises(RuntimeError, match="impl='ffi'"):
        softmax_ce_hvp(*problem(rng, "float32"), impl="ffi")
    assert softmax_ce_hvp(*problem(rng, "float32")).shape == (3, 6, 301)
