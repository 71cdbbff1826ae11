"""Activation functions made whole: the same derivatives, from one residual for each order."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.jaxprs import equations
from curvax.operators import activations
from curvax.operators.activations import with_whole_activations


def _of_a_mask(x):
    """Derivatives of the square root are infinite where it is not taken."""
    positive = x > 0.3
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)) * x, x**3)


CURVED = {
    "gelu": jax.nn.gelu,
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "squared relu": lambda x: jax.nn.relu(x) ** 2,
    "softcap": lambda x: 3 * jnp.tanh(x / 3),
    "own": lambda x: x * jnp.exp(-x * x) + jnp.log1p(x * x) / 2,
    "mask": _of_a_mask,
}
# JAX gives them a rule, which is not looked into.
OWN_RULES = {"softplus", "squared relu"}
FLAT = {
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "exp": jnp.exp,  # of which every derivative is the value
    "square": jnp.square,
    "scale": lambda x: 3 * x - 1,
}


def whole(fun, *args):
    jaxpr = jax.make_jaxpr(with_whole_activations(fun))(*args).jaxpr
    return [eqn for eqn in equations(jaxpr) if eqn.primitive is activations._WHOLE]


def loss(activation, form="plain"):
    """Two layers with a gate, so that what is read outside of the activation is differentiated."""

    def layer(x, w):
        return activation(x @ w) * (x + 1), None

    def of(params, batch):
        x = batch
        if form == "scan":
            x, _ = jax.lax.scan(layer, x, params)
        elif form == "checkpoint":
            x, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
        else:
            for w in params:
                x, _ = (jax.jit(layer) if form == "jit" else layer)(x, w)
        return jnp.mean(x**2)

    return of


def problem(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.standard_normal((2, 3, 3)) / 2, dtype),
        jnp.asarray(rng.standard_normal((5, 3)), dtype),
    )


@pytest.mark.parametrize(
    "name, form",
    [
        *((name, "plain") for name in CURVED),
        ("mask", "scan"),
        ("silu", "checkpoint"),
        ("elu", "jit"),
    ],
)
def test_products_are_those_of_the_loss_as_it_is(name, form):
    own = loss(CURVED[name], form)
    assert bool(whole(own, *problem(np.float32))) == (name not in OWN_RULES)
    with jax.enable_x64(True):
        params, batch = problem(np.float64)
        dense = jax.hessian(lambda w: own(w.reshape(params.shape), batch))(params.ravel())
        scale = np.abs(dense).max()
        for linearize in (True, False):
            op = cx.hessian(own, params, batch, linearize=linearize)
            np.testing.assert_allclose(op.product(jnp.eye(18)), dense, atol=1e-13 * scale, rtol=0)
    op = cx.hessian(own, *problem(np.float32))
    np.testing.assert_allclose(op.product(jnp.eye(18, dtype="f")), dense, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize("name", ["exact gelu", "softplus", "mask"])
def test_gauss_newton_products(name):
    def forward(params, batch):
        return CURVED[name](batch @ params[0]) @ params[1]

    with jax.enable_x64(True):
        params, batch = problem(np.float64)
        op = cx.ggn(forward, lambda outputs, batch: jnp.sum(outputs**2) / 2, params, batch)
        jacobian = jax.jacobian(lambda w: forward(w.reshape(params.shape), batch).ravel())
        rows = jacobian(params.ravel())
        expected = rows.T @ rows
        scale = np.abs(expected).max()
        np.testing.assert_allclose(op.product(jnp.eye(18)), expected, atol=1e-13 * scale, rtol=0)


@pytest.mark.parametrize("name", FLAT)
def test_what_would_keep_more_stays_as_it_is(name):
    assert not whole(loss(FLAT[name]), *problem(np.float32))


def test_sixteen_bits_stay_as_they_are():
    for dtype in (jnp.bfloat16, jnp.float16):
        assert not whole(loss(jax.nn.gelu), *problem(dtype))


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_residuals(form):
    """Of a layer `gelu(x W)`: value, two derivatives, and what is multiplied by them."""
    layers, size, width = 3, 64, 16

    def own(params, x):
        def layer(x, w):
            return jax.nn.gelu(x @ w), None

        if form == "scan":
            x, _ = jax.lax.scan(layer, x, params)
        else:
            for w in params:
                x, _ = layer(x, w)
        return jnp.sum(x)

    params, x = jnp.ones((layers, width, width)) / width, jnp.ones((size, width))
    one = size * width * 4
    op = cx.hessian(own, params, x, linearize=True)
    # f, f', f'', the upstream gradient c and f' c; of a scan the carry, and the first x, too.
    assert op.residual_bytes <= layers * (6 if form == "scan" else 5) * one + one


def test_programs_hold_plain_operations():
    op = cx.hessian(loss(jax.nn.gelu, "scan"), *problem(np.float32))
    product = op.stacks[0].product
    for program in (product.primal, product.linear):
        names = {eqn.primitive.name for eqn in equations(program.traced.jaxpr)}
        assert activations._WHOLE.name not in names and "dot_general" in names


def test_results_that_are_not_curved_or_no_numbers_are_made_as_before():
    def own(x, y):
        a = jax.nn.gelu(x)
        return jnp.sum(jnp.where(x > 0, y, a * y)) + jnp.sum(2 * x * y) + jnp.sum(a * a * y)

    with jax.enable_x64(True):
        x, y = np.random.default_rng(1).standard_normal((2, 4))
        (found,) = whole(own, x, y)
        assert len(found.outvars) == 2  # gelu and its square
        for derive in (jax.grad, jax.hessian):
            expected, got = (derive(f)(x, y) for f in (own, with_whole_activations(own)))
            np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


UNARY = [jnp.tanh, jnp.exp, jnp.sin, jax.nn.sigmoid, jnp.square, jnp.negative, jax.nn.relu]
BINARY = [jnp.add, jnp.subtract, jnp.multiply]


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))))
def test_any_program_has_the_same_derivatives(steps):
    """Of random operations on two arrays, to the third order."""

    def own(x, y):
        made = [x, y, 0.5]
        for kind, i, j in steps:
            a, b = made[i % len(made)], made[j % len(made)]
            made.append(UNARY[kind](a) if kind < len(UNARY) else BINARY[kind - len(UNARY)](a, b))
        return sum(jnp.sum(jnp.tanh(value)) for value in made[2:])

    def along(f, x, y):
        u = jnp.cos(x)
        for _ in range(3):
            yield f(x, y)
            f = lambda x, y, f=f: jax.jvp(f, (x, y), (u, -u))[1]  # noqa: E731
        yield f(x, y)

    with jax.enable_x64(True):
        x, y = np.random.default_rng(0).standard_normal((2, 3)) / 2
        expected = list(along(own, x, y))
        np.testing.assert_allclose(
            list(along(with_whole_activations(own), x, y)), expected, rtol=1e-10, atol=1e-10
        )


def test_batches_are_mapped_over():
    def own(x):
        return jnp.sum(jax.nn.gelu(x) * jnp.cos(x))

    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((4, 3))
        for axis in (0, 1):
            expected = jax.vmap(jax.hessian(own), axis)(x)
            got = jax.vmap(jax.hessian(with_whole_activations(own)), axis)(x)
            np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-14)


@jax.custom_jvp
def centred(x):
    return jnp.tanh(x)


@centred.defjvp
def _(primals, tangents):
    return centred(*primals), tangents[0] - jnp.mean(tangents[0], axis=0, keepdims=True)


def test_a_rule_of_ones_own_need_not_be_elementwise():
    def own(x):
        return jnp.sum(jax.nn.gelu(centred(2 * x)) * jnp.cos(x))

    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((4, 3))
        expected = jax.jacfwd(jax.jacfwd(own))(x)
        got = jax.jacfwd(jax.jacfwd(with_whole_activations(own)))(x)
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_update_with_a_part_of_itself(dtype):
    """XLA:CPU would put it into the array before all of that is read."""

    def many(x):
        for _ in range(4):
            x = jnp.tanh(jnp.sin(x))
        return x

    def forward(params, x):
        y = many(x @ params["in"])
        return many(y + jax.lax.dynamic_update_slice(y, y[:2], (1, 0, 0))) @ params["out"]

    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        params = {
            "in": jnp.asarray(rng.standard_normal((4, 3)), dtype),
            "out": jnp.asarray(rng.standard_normal((3, 2)), dtype),
        }
        x = jnp.asarray(rng.standard_normal((5, 3, 4)), dtype)
        op = cx.ggn(forward, lambda outputs, x: jnp.sum(outputs**2) / 2, params, x)
        flat = op.ravel(params)
        jacobian = jax.jacobian(lambda flat: forward(op.unravel(flat), x).ravel())(flat)
        expected = jacobian.T @ jacobian
        scale = np.abs(expected).max()
        atol = 50 * float(jnp.finfo(dtype).eps) * scale
        np.testing.assert_allclose(op.product(jnp.eye(18)), expected, atol=atol, rtol=0)
