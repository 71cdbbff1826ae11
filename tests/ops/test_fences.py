"""The fence rewrite: exact, and in place, whatever the model is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import curvax as cx
from curvax import _native
from curvax.ops.fence import fence

native = pytest.mark.skipif(not _native.available(), reason="built without the compiled module")

N, D = 96, 64


def _weights(key=0):
    keys = jax.random.split(jax.random.key(key), 4)
    return {
        "a": jax.random.normal(keys[0], (D, D)) / 8,
        "b": jax.random.normal(keys[1], (D, D)) / 8,
        "stack": jax.random.normal(keys[2], (3, D, D)) / 8,
        "x": jax.random.normal(keys[3], (N, D)),
    }


def _layer(x, w):
    return x + jnp.tanh((x * jnp.mean(x * x, -1, keepdims=True)) @ w)


@jax.custom_jvp
def _smooth(x):
    return x * jax.nn.sigmoid(x)


@_smooth.defjvp
def _smooth_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    s = jax.nn.sigmoid(x)
    return _smooth(x), t * (s + x * s * (1 - s))


def plain(p):
    return jnp.sum(_layer(_layer(p["x"], p["a"]), p["b"]) ** 2)


def scanned(p):
    out, _ = lax.scan(lambda x, w: (_layer(x, w), None), p["x"], p["stack"])
    return jnp.sum(out**2)


def remat(p):
    layer = jax.checkpoint(_layer)
    return jnp.sum(layer(layer(p["x"], p["a"]), p["b"]) ** 2)


def conditional(p):
    out = lax.cond(p["x"][0, 0] > 100, _layer, lambda x, w: _layer(_layer(x, w), w), p["x"], p["a"])
    return jnp.sum(out**2)


def custom(p):
    return jnp.sum(_smooth(_smooth(p["x"] * p["x"]) @ p["a"]) ** 2)


def jitted(p):
    inner = jax.jit(lambda x, w: (x * x) @ w)
    return jnp.sum(inner(inner(p["x"], p["a"]) * p["x"], p["b"]) ** 2)


def looped(p):
    """A while loop, which only forward mode can pass."""

    def body(state):
        i, x = state
        return i + 1, _layer(x, p["a"])

    return jnp.sum(lax.while_loop(lambda s: s[0] < 3, body, (0, p["x"]))[1] ** 2)


MODELS = [plain, scanned, remat, conditional, custom, jitted]


def _hvp(loss):
    return lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1]


def _relative_difference(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def _count(text):
    return text.count("curvax.fence")


@native
@pytest.mark.parametrize("loss", MODELS, ids=lambda f: f.__name__)
def test_the_rewrite_is_exact(loss):
    p, v = _weights(), _weights(1)
    compiled = jax.jit(fence(_hvp(loss))).lower(p, v).compile()
    assert _count(compiled.as_text()) > 0
    assert _relative_difference(compiled(p, v), jax.jit(_hvp(loss))(p, v)) <= 1e-6


@native
def test_forward_mode_through_while():
    p, v = _weights(), _weights(1)

    def second(p, v):
        first = lambda q: jax.jvp(looped, (q,), (v,))[1]  # noqa: E731
        return jax.jvp(first, (p,), (v,))[1]

    compiled = jax.jit(fence(second)).lower(p, v).compile()
    assert _count(compiled.as_text()) > 0
    np.testing.assert_allclose(compiled(p, v), jax.jit(second)(p, v), rtol=1e-5)


@pytest.mark.thin(6)
@native
@pytest.mark.parametrize("loss", MODELS, ids=lambda f: f.__name__)
def test_under_vmap_of_the_caller(loss):
    p, vs = _weights(), jax.tree.map(lambda x: jnp.stack([x, -2 * x, x * x]), _weights(1))
    fenced = jax.vmap(fence(_hvp(loss)), in_axes=(None, 0))
    expected = jax.vmap(_hvp(loss), in_axes=(None, 0))(p, vs)
    assert _relative_difference(jax.jit(fenced)(p, vs), expected) <= 1e-6


@native
def test_no_fence_copies():
    """Aliased and with all its readers behind it, a fence moves nothing."""
    p, v = _weights(), _weights(1)
    text = jax.jit(fence(_hvp(plain))).lower(p, v).compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and "fence" in line]
    assert calls
    assert all("output_to_operand_aliasing={{}: (0, {})}" in line for line in calls)
    operands = {line.split("custom-call(")[1].split(")")[0].split(" ")[-1] for line in calls}
    assert not any(name.startswith("%copy") for name in operands)


@native
def test_small_values_are_left_alone():
    fun = lambda x: jnp.tanh(x) @ x  # noqa: E731
    text = jax.jit(fence(fun)).lower(jnp.ones((8, 8))).compile().as_text()
    assert _count(text) == 0


def _wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


def _dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _batch_loss(p, batch):
    return plain({**p, "x": batch}) / batch.shape[0]


def _problem():
    p, v = (_wide(_weights(key)) for key in (0, 1))
    batch = p.pop("x")
    v.pop("x")
    return p, v, batch


@native
@pytest.mark.parametrize("linearize", [True, False])
def test_products_can_be_differentiated(linearize):
    """`q(p) = vᵀ H(p) v` of a fenced product: what JAX says of the same without an operator."""
    with jax.enable_x64(True):
        p, v, batch = _problem()
        along = jax.tree.map(lambda x: jnp.cos(x), v)

        def quadratic(p, scale):
            op = cx.hessian(_batch_loss, p, scale * batch, linearize=linearize)
            return _dot(v, op @ v)

        def truth(p, scale):
            gradient = jax.grad(lambda q: _batch_loss(q, scale * batch))
            return _dot(v, jax.jvp(gradient, (p,), (v,))[1])

        def derivatives(q, p):
            one = jnp.float64(1)
            slope = jax.linearize(lambda q_: q(q_, one), p)[1](along)
            scales = jnp.linspace(0.5, 1.5, 3)
            return {
                "grad": jax.grad(q)(p, one),
                "jvp": jax.jvp(lambda p: q(p, one), (p,), (along,)),
                "linearize": slope,
                "vmap": jax.vmap(lambda s: q(p, s))(scales),
                "vmap of grad": jax.vmap(lambda s: jax.grad(q)(p, s))(scales),
                "hessian": jax.hessian(lambda s: q(p, s))(one),
            }

        compiled = jax.jit(functools.partial(derivatives, quadratic)).lower(p).compile()
        assert _count(compiled.as_text()) > 0
        got, want = compiled(p), jax.jit(functools.partial(derivatives, truth))(p)
        for name in want:
            assert _relative_difference(got[name], want[name]) <= 1e-12, name


@native
def test_products_of_an_operator_can_be_differentiated_in_the_vector_and_at_other_parameters():
    with jax.enable_x64(True):
        p, v, batch = _problem()
        op = cx.hessian(_batch_loss, p, batch)
        product = op @ v
        # <c, H v> is linear in v, and H symmetric.
        transposed = jax.grad(lambda v: _dot(p, op @ v))(v)
        assert _relative_difference(transposed, op @ p) <= 1e-12
        block = jax.tree.map(lambda x: jnp.stack([x, -x]), v)
        want = jax.tree.map(lambda x: jnp.stack([x, -x]), product)
        assert _relative_difference(jax.vmap(lambda v: op @ v)(block), want) <= 1e-12
        moved = jax.grad(lambda p: _dot(v, op.at(p) @ v))(p)
        want = jax.grad(
            lambda p: _dot(v, jax.jvp(lambda q: jax.grad(_batch_loss)(q, batch), (p,), (v,))[1])
        )(p)
        assert _relative_difference(moved, want) <= 1e-12


@native
def test_a_loss_that_multiplies_by_an_operator_has_a_hessian():
    """Fences of the inner product meet those of the outer one."""
    with jax.enable_x64(True):
        p, v, batch = _problem()

        def outer(p, batch):
            return _dot(v, cx.hessian(_batch_loss, p, batch) @ v)

        def plainly(p):
            gradient = functools.partial(jax.grad(_batch_loss), batch=batch)
            return _dot(v, jax.jvp(gradient, (p,), (v,))[1])

        got = cx.hessian(outer, p, batch) @ v
        want = jax.jvp(jax.grad(plainly), (p,), (v,))[1]
        assert _relative_difference(got, want) <= 1e-12


def test_switched_off(monkeypatch):
    monkeypatch.setenv("CURVAX_IMPL", "reference")
    assert fence(plain) is plain
