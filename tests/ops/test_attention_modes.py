"""Attention under JAX's transformations, against plain JAX in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from tests.ops.attention_problems import as_dtype, assert_close, loss, make_problem, ours, truth

import curvax as cx
from curvax.ops.attention import tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "_ON_CPU", (4, 64))


def stack(tree):
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), tree)


def hvp(f, s, v):
    return jax.jvp(jax.grad(f), (s,), (v,))[1]


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))


def scanned(f):
    """As two layers in a scan, whose body depends on the loop's counter."""

    def total(slots):
        def add(total, t):
            scaled = jax.tree.map(lambda x: x * jnp.cos(t).astype(x.dtype), slots)
            return total + f(scaled), None

        return jax.lax.scan(add, jnp.zeros((), slots[0].dtype), jnp.arange(2.0))[0]

    return total


def layers(f):
    """The value of one is the query of the next; `f` is the attention with its loss."""

    def total(slots):
        def layer(slots, _):
            return jax.grad(f)(slots), None

        return inner(jax.lax.scan(layer, slots, None, length=2)[0], slots)

    return total


def curve(f, s):
    """The second derivative along a direction: forward over forward."""
    return lambda v: jax.jvp(lambda t: jax.jvp(f, (t,), (v,))[1], (s,), (v,))[1]


def directions(f, s):
    """A sum over directions of a function of derivatives along them."""
    return lambda t: jnp.sum(jnp.sin(jax.vmap(lambda v: jax.jvp(f, (t,), (v,))[1])(stack(s))))


def transposed(f, s, v):
    return jax.linear_transpose(jax.linearize(jax.grad(f), s)[1], s)(v)


MODES = {
    "value": lambda f, s, v: f(s),
    "jvp": lambda f, s, v: jax.jvp(f, (s,), (v,)),
    "grad": lambda f, s, v: jax.grad(f)(s),
    "jvp_grad": hvp,
    "jit": jax.jit(hvp, static_argnums=0),
    "grad_jvp": lambda f, s, v: jax.grad(lambda t: jax.jvp(f, (t,), (v,))[1])(s),
    "grad_grad": lambda f, s, v: jax.grad(lambda t: inner(jax.grad(f)(t), v))(s),
    "vjp_grad": lambda f, s, v: jax.vjp(jax.grad(f), s)[1](v),
    "linearize": lambda f, s, v: jax.linearize(jax.grad(f), s)[1](v),
    "jit_linearize": lambda f, s, v: jax.jit(lambda t: jax.linearize(jax.grad(f), t)[1])(s)(v),
    "linear_transpose": transposed,
    "jvp_jvp": lambda f, s, v: jax.jvp(lambda t: jax.jvp(f, (t,), (v,))[1], (s,), (s,)),
    "grad_of_curve": lambda f, s, v: jax.grad(curve(f, s))(v),
    "hessian": lambda f, s, v: jax.hessian(lambda x: f((s[0], x, *s[2:])))(s[1]),
    "of_one_slot": lambda f, s, v: hvp(lambda x: f((*s[:2], x, s[3])), s[2], v[2]),
    "of_the_bias": lambda f, s, v: hvp(lambda x: f((*s[:3], x)), s[3], v[3]),
    "vmap_tangents": lambda f, s, v: jax.vmap(lambda u: hvp(f, s, u))(stack(v)),
    "vmap_linearized": lambda f, s, v: jax.vmap(jax.linearize(jax.grad(f), s)[1])(stack(v)),
    "vmap_one_tangent": lambda f, s, v: jax.vmap(lambda u: hvp(f, s, (u, *v[1:])))(stack(v[0])),
    "vmap_grad_jvp": lambda f, s, v: jax.vmap(
        lambda u: jax.grad(lambda t: jax.jvp(f, (t,), (u,))[1])(s)
    )(stack(v)),
    "vmap_slots": lambda f, s, v: jax.vmap(lambda t: hvp(f, t, v))(stack(s)),
    "vmap_query": lambda f, s, v: jax.vmap(lambda q: hvp(f, (q, *s[1:]), v))(stack(s[0])),
    "vmap_bias": lambda f, s, v: jax.vmap(lambda b: hvp(f, (*s[:3], b), v), 0, 1)(stack(s[3])),
    "vmap_twice": lambda f, s, v: jax.vmap(lambda t: jax.vmap(lambda u: hvp(f, t, u))(stack(v)))(
        stack(s)
    ),
    "grad_of_vmapped_jvp": lambda f, s, v: jax.grad(directions(f, v))(s),
    "jvp_of_jacobian": lambda f, s, v: jax.jvp(
        jax.jacrev(lambda t: jnp.stack([f(t), f((2 * t[0], *t[1:]))])), (s,), (v,)
    )[1],
    "scan": lambda f, s, v: hvp(scanned(f), s, v),
    "scan_linearize": lambda f, s, v: jax.linearize(jax.grad(scanned(f)), s)[1](v),
    "scan_vjp": lambda f, s, v: jax.vjp(jax.grad(scanned(f)), s)[1](v),
    "scan_of_gradients": lambda f, s, v: jax.grad(layers(f))(s),
    "checkpoint": lambda f, s, v: hvp(jax.checkpoint(f), s, v),
    "checkpoint_vjp": lambda f, s, v: jax.vjp(jax.grad(jax.checkpoint(f)), s)[1](v),
    "scan_of_checkpoints": lambda f, s, v: hvp(scanned(jax.checkpoint(f)), s, v),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, rng):
    slots, tangents, weights = make_problem(
        rng, 2, 7, 9, heads=2, of_keys=1, width=3, bias=(1, 2, 1, 9)
    )
    options, run = {"is_causal": True, "softcap": 3.0}, jax.jit(MODES[mode], static_argnums=0)
    with jax.enable_x64(True):
        arrays = as_dtype((slots, tangents, weights), jnp.float64)
        want = run(loss(truth, arrays[2], options), *arrays[:2])
        for impl in ("tiled", "reference"):
            got = run(loss(ours(impl), arrays[2], options), *arrays[:2])
            assert_close(got, want, 1e-12)


@pytest.mark.parametrize("mode", ["grad_jvp", "linear_transpose", "vmap_slots", "jvp_jvp"])
def test_modes_that_are_not_compiled_as_a_whole(mode, rng):
    slots, tangents, weights = as_dtype(make_problem(rng, 1, 5, 5), jnp.float32)
    with jax.enable_x64(True):
        s, v, w = as_dtype((slots, tangents, weights), jnp.float64)
        want = MODES[mode](loss(truth, w), s, v)
    got = MODES[mode](loss(ours("tiled"), weights), slots, tangents)
    assert_close(got, want, 1e-5)


def test_the_product_is_symmetric(rng):
    slots, v, weights = as_dtype(make_problem(rng, bias=(1, 4, 9, 11)), jnp.float32)
    f = loss(ours("tiled"), weights, {"softcap": 2.0})
    product = jax.jit(jax.linearize(jax.grad(f), slots)[1])
    u = jax.tree.map(jnp.cos, v)
    there, back = inner(product(u), v), inner(product(v), u)
    assert abs(there - back) <= 1e-5 * abs(there)


def test_a_block_of_tangents_is_one_product(rng):
    slots, tangents, weights = as_dtype(make_problem(rng), jnp.float32)
    f = loss(ours("tiled"), weights)
    one = jax.make_jaxpr(lambda v: hvp(f, slots, v))(tangents)
    many = jax.make_jaxpr(jax.vmap(lambda v: hvp(f, slots, v)))(stack(tangents))
    own = [[eqn.primitive.name for eqn in x.jaxpr.eqns] for x in (one, many)]
    own = [[name for name in all_of_it if name.startswith("dot_p")] for all_of_it in own]
    # The output, its tangent, the gradient, and the product.
    assert own[0] == own[1] == ["dot_product_attention"] + ["dot_product_attention_product"] * 3


def test_tangents_in_parts(rng, monkeypatch):
    """A block whose tiles would be too large is taken part by part."""
    slots, tangents, weights = as_dtype(make_problem(rng, 1, 7, 7), jnp.float32)
    f = loss(ours("tiled"), weights)
    blocks = jax.tree.map(lambda x: jnp.stack([x * i for i in range(1, 12)]), tangents)
    assert tiles.Grid.block(2, 7, 7) == 8
    got = jax.jit(jax.vmap(lambda v: hvp(f, slots, v)))(blocks)
    want = jax.tree.map(np.asarray, hvp(f, slots, tangents))
    for i in (0, 5, 6, 10):
        assert_close(jax.tree.map(lambda x, i=i: x[i] / (i + 1), got), want, 1e-5)


def third(f, s, v):
    return jax.jvp(lambda t: hvp(f, t, v), (s,), (v,))


def third_of_forward(f, s, v):
    return jax.jvp(lambda t: jax.jvp(lambda u: jax.jvp(f, (u,), (v,))[1], (t,), (v,)), (s,), (v,))


def third_in_upstream(f, s, v):
    """Of what is linear in the gradient: its second derivative in the slots, along a gradient."""
    return jax.grad(lambda t: inner(hvp(f, t, v), v))(s)


@pytest.mark.parametrize("mode", [third, third_of_forward, third_in_upstream])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_a_third_derivative_is_refused_by_name(mode, impl, rng):
    slots, tangents, weights = as_dtype(make_problem(rng), jnp.float32)
    message = "^dot_product_attention is differentiable twice.*use jax.nn.dot_product_attention"
    with pytest.raises(NotImplementedError, match=message):
        mode(loss(ours(impl), weights), slots, tangents)


def test_shards(rng):
    """Over the batch, with a bias that every device has."""
    slots, tangents, weights = as_dtype(make_problem(rng, bias=(1, 4, 1, 11)), jnp.float32)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    cut, whole = PartitionSpec("d"), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=((cut, cut, cut, whole), cut),
        out_specs=whole,
    )
    def total(slots, weights):
        out = cx.nn.dot_product_attention(*slots, is_causal=True)
        return jax.lax.psum(jnp.sum(jnp.sin(out) * weights), "d")

    got = jax.jit(lambda s, v: hvp(lambda t: total(t, weights), s, v))(slots, tangents)
    want = hvp(loss(ours("tiled"), weights, {"is_causal": True}), slots, tangents)
    assert_close(got, jax.tree.map(np.asarray, want), 1e-6)
