"""Programs are kept by what they compute: one loss is compiled once, two losses never share."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.operators.compilations import compiled

import curvax as cx
from curvax import program
from curvax.operators.checked_product import compiled_product

RNG = np.random.default_rng(3)
SHAPES = {"v": (4, 3), "w": (5, 4)}
LOSS = cx.losses.SoftmaxCrossEntropy(lambda batch: batch[1])


def checkpoint(seed):
    """Parameters and a batch, as at some step of training."""
    rng = np.random.default_rng(seed)
    params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}
    x = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    return params, (x, jnp.asarray(rng.integers(0, 3, 6)))


def forward(params, batch):
    """With a function that has a rule of its own, `relu`."""
    return jax.nn.relu(batch[0] @ params["w"]) @ params["v"] + jnp.tanh(batch[0][:, :3])


def objective(params, batch):
    return LOSS(jnp.sin(forward(params, batch)), batch)


KINDS = {
    "linearised": lambda p, b: cx.hessian(objective, p, b, linearize=True),
    "recomputed": lambda p, b: cx.hessian(objective, p, b, linearize=False),
    "microbatches": lambda p, b: cx.hessian(objective, p, b, microbatch_size=2),
    "split": lambda p, b: cx.hessian(objective, p, b, microbatch_size=halves),
    "ggn": lambda p, b: cx.ggn(forward, LOSS, p, b),
    "fisher": lambda p, b: cx.fisher(forward, LOSS, p, b),
    "samples": lambda p, b: cx.fisher(forward, LOSS, p, b, microbatch_size=1),
    "drawn": lambda p, b: cx.fisher(forward, LOSS, p, b, kind="mc"),
    "differences": lambda p, b: cx.hessian(objective, p, b, method="finite_difference"),
    "model": lambda p, b: cx.ggn(cx.Model(p, forward, LOSS), b),
    "function": lambda p, b: cx.from_matvec(
        lambda v: jax.tree.map(lambda x: 2 * jax.nn.relu(b[0][0, 0]) * x, v), p
    ),
}


def halves(batch):
    return [jax.tree.map(lambda leaf, i=i: leaf[i : i + 3], batch) for i in (0, 3)]


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_operator_compiles_nothing(kind):
    def run(seed):
        params, batch = checkpoint(seed)
        return KINDS[kind](params, batch) @ params

    jax.clear_caches()  # of another kind that computes the same
    first, _ = compiled(lambda: run(0))
    assert first > 0
    again, product = compiled(lambda: run(1))
    assert again == 0
    if kind in ("split", "samples", "function"):
        jax.clear_caches()
        jax.tree.map(np.testing.assert_array_equal, product, run(1))


def test_nor_does_what_is_made_of_it_or_a_program_of_a_solve():
    def run(seed):
        params, batch = checkpoint(seed)
        op = KINDS["linearised"](params, batch)
        damped = (op + cx.identity(op)).restrict(cx.match_names("w"))
        trace = cx.trace(op, num_matvecs=4, method="hutchinson", seed=0)
        return damped @ {"v": None, "w": params["w"]}, trace.estimate

    assert compiled(lambda: run(0))[0] > 0
    again, found = compiled(lambda: run(1))
    assert again == 0
    jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, found, run(1))


def test_at_the_same_shapes_neither_compiles_nor_traces():
    traces = []

    def loss(params, batch):
        traces.append(0)
        return objective(params, batch)

    params, batch = checkpoint(0)
    op = cx.hessian(loss, params, batch)
    op @ params
    before = len(traces)
    other, data = checkpoint(1)
    count, product = compiled(lambda: op.at(other, batches=data) @ other)
    assert count == 0 and len(traces) == before
    fresh = cx.hessian(loss, other, data) @ other
    jax.tree.map(np.testing.assert_array_equal, product, fresh)


def second_derivative(loss, x):
    """Of a loss of one number, by operators of both ways of multiplication."""
    point, batch = jnp.float32(x), np.ones(2, np.float32)
    ops = [cx.hessian(loss, point, batch, linearize=kept) for kept in (True, False)]
    found = [float(compiled_product(op, jnp.ones((1, 1)))[0, 0]) for op in ops]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    return found[0]


def closing_over(value):
    return lambda p, batch: jnp.mean(value * p**2 / 2) * batch[0]


def closing_over_in_jit(value):
    inner = jax.jit(lambda p: value * p**2 / 2)
    return lambda p, batch: inner(p) * batch[0]


def closing_over_in_scan(value):
    inner = jax.jit(lambda p: value * p**2 / 2)

    def loss(p, batch):
        return jax.lax.scan(lambda c, x: (c + inner(p) * x, None), 0.0 * p, batch)[0] / 2

    return loss


def calling_back(value):
    """A pure callback as the slope, which JAX does not look into."""

    def slope(p):
        return jax.pure_callback(
            lambda x: np.float32(value) * np.asarray(x),
            jax.ShapeDtypeStruct((), np.float32),
            p,
            vmap_method="sequential",
        )

    @jax.custom_jvp
    def square(p):
        return p**2 / 2

    @jax.custom_jvp
    def times(p):
        return slope(p)

    square.defjvp(lambda primals, t: (square(primals[0]), times(primals[0]) * t[0]))
    times.defjvp(lambda primals, t: (times(primals[0]), slope(t[0])))
    return lambda p, batch: square(p) * batch[0]


def with_jvp(value):
    """The same function for all values, with another derivative of the derivative."""

    @jax.custom_jvp
    def slope(p):
        return p + 0.0

    slope.defjvp(lambda primals, t: (slope(primals[0]), value * t[0]))

    @jax.custom_jvp
    def square(p):
        return p**2 / 2

    square.defjvp(lambda primals, t: (square(primals[0]), slope(primals[0]) * t[0]))
    return lambda p, batch: square(p) * batch[0]


def with_vjp(value):
    """The same, by rules for reverse mode, which differ in the backward pass alone."""

    @jax.custom_vjp
    def square(p):
        return p**2 / 2

    square.defvjp(lambda p: (square(p), p), lambda p, g: (value * p * g,))
    return lambda p, batch: square(p) * batch[0]


DIFFERENT = {
    "constant": lambda value: lambda p, batch: value * p**2 / 2 * batch[0],
    "numpy scalar": lambda value: closing_over(np.float32(value)),
    "numpy array": lambda value: closing_over(np.full(3, value, np.float32)),
    "array": lambda value: closing_over(jnp.float32(value)),
    "constant in jit": lambda value: closing_over_in_jit(float(value)),
    "array in jit": lambda value: closing_over_in_jit(jnp.float32(value)),
    "array in scan": lambda value: closing_over_in_scan(jnp.float32(value)),
    "callback": calling_back,
    "jvp rule": with_jvp,
    "vjp rule": with_vjp,
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_losses_that_differ_in_little_do_not_share(kind):
    for value in (2.0, 3.0, 5.0, 2.0):
        loss = DIFFERENT[kind](value)
        assert second_derivative(loss, 0.7) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", ["numpy array", "array", "array in jit"])
def test_arrays_that_a_loss_closes_over_are_arguments(kind):
    """Another array of the same shape compiles nothing."""
    second_derivative(DIFFERENT[kind](2.0), 0.7)
    count, found = compiled(lambda: second_derivative(DIFFERENT[kind](7.0), 0.7))
    assert count == 0 and found == pytest.approx(7, rel=1e-6)


def test_an_array_of_numpy_that_is_changed_is_read_anew():
    weights = np.array([1.0, 3.0], np.float32)

    def loss(p, batch):
        return jnp.sum(weights * p**2 / 2) * batch[0]

    assert second_derivative(loss, 0.7) == pytest.approx(4, rel=1e-6)
    weights[:] = 5
    assert second_derivative(loss, 0.7) == pytest.approx(10, rel=1e-6)


def test_a_third_derivative_follows_the_rules_of_its_own_loss():
    """Two products that are the same but for a rule, which only their derivative applies."""

    def loss_with(third):
        @jax.custom_jvp
        def curvature(p):
            return jnp.cos(p)

        curvature.defjvp(lambda primals, t: (curvature(primals[0]), third * t[0]))

        @jax.custom_jvp
        def slope(p):
            return jnp.sin(p)

        slope.defjvp(lambda primals, t: (slope(primals[0]), curvature(primals[0]) * t[0]))

        @jax.custom_jvp
        def value(p):
            return -jnp.cos(p)

        value.defjvp(lambda primals, t: (value(primals[0]), slope(primals[0]) * t[0]))
        return lambda p, batch: value(p) * batch[0]

    def product(p, loss):
        return cx.hessian(loss, p, np.ones(2, np.float32)) @ jnp.float32(1)

    p = jnp.float32(0.4)
    for third in (3.0, 5.0, 3.0):
        loss = loss_with(third)
        assert float(product(p, loss)) == pytest.approx(np.cos(0.4), rel=1e-6)
        assert float(jax.grad(product)(p, loss)) == pytest.approx(third, rel=1e-6)


@pytest.mark.parametrize("setting", ["kernels", "precision"])
def test_other_settings_are_other_programs(setting, monkeypatch):
    params, batch = checkpoint(0)
    expected = cx.hessian(objective, params, batch) @ params
    if setting == "kernels":
        monkeypatch.setenv("CURVAX_IMPL", "reference")
    with jax.default_matmul_precision("highest" if setting == "precision" else None):
        count, found = compiled(lambda: cx.hessian(objective, params, batch) @ params)
    assert count >= 2  # the loss with its residuals, and the product
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=1e-6)


def test_what_is_compiled_keeps_nothing_of_the_user():
    """Neither arrays, nor functions, nor models, nor operators; and no more with more operators."""

    class Data:
        pass

    def run(seed):
        params, batch = checkpoint(seed)
        owned = Data()

        def own_forward(params, batch):
            assert isinstance(owned, Data)
            return forward(params, batch)

        op = cx.ggn(cx.Model(params, own_forward, LOSS), batch)
        op @ params
        cx.trace(op, num_matvecs=4, method="hutchinson", seed=0)
        return weakref.ref(owned), weakref.ref(op), weakref.ref(params["w"])

    run(0)
    gc.collect()
    before = len(jax.live_arrays())
    for seed in range(1, 4):
        kept = run(seed)
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3
    assert len(jax.live_arrays()) == before


def test_a_jitted_function_of_operators_is_compiled_once():
    """Of a user's own, where nothing in the loss is known by identity alone."""

    @jax.jit
    def rayleigh(op, v):
        flat = op.ravel(v)
        return flat @ op.ravel(op @ v) / (flat @ flat)

    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch[0] @ params["w"] @ params["v"]) ** 2)

    for seed in range(3):
        params, batch = checkpoint(seed)
        op = cx.hessian(loss, params, batch)
        flat = np.asarray(op.ravel(params), np.float64)
        product = np.asarray(op.ravel(op @ params), np.float64)
        expected = flat @ product / (flat @ flat)
        assert float(rayleigh(op, params)) == pytest.approx(expected, rel=1e-5)
    assert rayleigh._cache_size() == 1


def test_the_programs_last_used_are_kept_of_losses_that_differ_in_a_number(monkeypatch):
    monkeypatch.setattr(program, "_CACHED", 4)
    params, batch = checkpoint(0)
    client, counts = jax.devices()[0].client, []
    for i in range(10):
        op = cx.hessian(lambda p, b, i=i: jnp.float32(1.5 + i) * objective(p, b)[0], params, batch)
        jax.block_until_ready(op @ params)
        if i in (6, 9):
            gc.collect()
            counts.append(len(client.live_executables()))
    assert counts[0] == counts[1]
