"""Scans over layers read and write the flat vector in place: products are as without them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax import _native
from curvax.jaxprs import equations
from curvax.operators import flat_product
from curvax.operators.checked_product import compiled_product
from curvax.ops.assembly import put, uninitialised_like, zeros

native = pytest.mark.skipif(not _native.available("put"), reason="built without compiled kernels")

LAYERS, WIDTH, ROWS = 5, 6, 7


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "after": jax.random.normal(keys[0], (WIDTH,), dtype),
        "embed": jax.random.normal(keys[1], (WIDTH, WIDTH), dtype) / 2,
        "layers": {
            "b": jax.random.normal(keys[2], (LAYERS, WIDTH), dtype),
            "scale": jax.random.normal(keys[3], (LAYERS,), dtype),
            "w": jax.random.normal(keys[4], (LAYERS, WIDTH, WIDTH), dtype) / 2,
        },
        "unused": jnp.ones((3,), dtype),
    }


def layer(x, p):
    return jnp.tanh(x @ p["w"] + p["b"][None]) * p["scale"] + x, jnp.sum(x * x)


def scanned(params, x, reverse=False):
    x, norms = lax.scan(layer, x @ params["embed"], params["layers"], reverse=reverse)
    return jnp.mean((x @ params["embed"].T) ** 2 * params["after"][None]) + jnp.mean(norms) / 8


def unrolled(params, x, reverse=False):
    order = range(LAYERS)[::-1] if reverse else range(LAYERS)
    x, norms = x @ params["embed"], []
    for i in order:
        x, norm = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]))
        norms.append(norm)
    out = jnp.mean((x @ params["embed"].T) ** 2 * params["after"][None])
    return out + jnp.mean(jnp.stack(norms)) / 8


def twice(loss):
    """The layers used by two scans, the second of them jitted, and one leaf outside them too."""

    def both(params, x):
        again = jax.jit(functools.partial(loss, reverse=True))(params, x + 1)
        return loss(params, x) + again + jnp.sum(params["layers"]["b"] ** 3)

    return both


def nested(loss):
    """The scan within another, which does not walk over the leaves."""

    def outer(params, x):
        if loss is unrolled:
            return sum(loss(params, x + i) for i in range(3))
        return lax.scan(lambda total, i: (total + loss(params, x + i), None), 0.0, jnp.arange(3.0))[
            0
        ]

    return outer


LOSSES = {
    "forwards": lambda loss: loss,
    "backwards": lambda loss: functools.partial(loss, reverse=True),
    "jitted": jax.jit,
    "twice": twice,
    "nested": nested,
    "checkpointed": jax.checkpoint,
}
DATA = jax.random.normal(jax.random.key(9), (ROWS, WIDTH))


def calls_put(op):
    """How often a product writes a part of the vector, by tracing it."""
    block = jnp.zeros((1, op.shape[0]), op.dtype)
    jaxpr = jax.make_jaxpr(op.product)(block).jaxpr
    names = [eqn.primitive.name for eqn in equations(jaxpr)]
    return names.count("curvax_put")


def error(found, truth):
    return float(np.abs(np.asarray(found) - truth).max() / np.abs(truth).max())


def dense(op):
    return np.stack([np.asarray(compiled_product(op, row)) for row in jnp.eye(op.shape[0])])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@native
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_the_unrolled_layers(x64, name, linearize):
    params, data = parameters(jnp.float64), DATA.astype(jnp.float64)
    make = functools.partial(cx.hessian, linearize=linearize)
    op = make(LOSSES[name](scanned), params, data)
    flat, unravel = ravel_pytree(params)
    truth = jax.hessian(lambda v: LOSSES[name](unrolled)(unravel(v), data))(flat)
    found = dense(op)
    assert error(found, truth) <= 1e-13
    # Of the three leaves of the layers, at least, and of the others.
    assert calls_put(op) >= 6


@native
@pytest.mark.parametrize("make", [cx.ggn, cx.fisher])
def test_other_matrices(make):
    def output(params, batch):
        return lax.scan(layer, batch[0] @ params["embed"], params["layers"])[0]

    def loss(logits, batch):
        return cx.losses.softmax_cross_entropy(logits, batch[1])

    op = make(output, loss, parameters(), (DATA, jnp.arange(ROWS) % WIDTH))
    assert calls_put(op) > 0
    truth = _without(op)
    assert error(dense(op), truth) <= 1e-6


def _without(op):
    """The matrix by the leaves of the vector, cut out and put together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_product, "_MOST", 0)
        jax.clear_caches()
        found = dense(op)
    jax.clear_caches()
    return found


@native
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("size", [None, 2])
def test_blocks_and_microbatches(block, size):
    params = parameters()
    data = jax.random.normal(jax.random.key(3), (6, WIDTH))
    op = cx.hessian(scanned, params, data, microbatch_size=size)
    vectors = jax.random.normal(jax.random.key(1), (block, op.shape[0]))
    truth = jnp.asarray(dense(cx.hessian(unrolled, params, data, microbatch_size=size)))
    found = compiled_product(op, vectors)
    assert error(found, vectors @ truth) <= 1e-5


@native
@pytest.mark.parametrize("names", ["layers.*", "layers.w", "embed"])
def test_some_of_the_parameters(names):
    params, where = parameters(), cx.match_names(names)
    op, other = (cx.hessian(loss, params, DATA, where=where) for loss in (scanned, unrolled))
    truth = dense(other)
    assert error(dense(op), truth) <= 1e-5


@native
def test_parameters_of_two_precisions(x64):
    params = parameters()
    params["layers"]["b"] = params["layers"]["b"].astype(jnp.float64)

    def loss(params, x, function):
        return function(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), x)

    data = DATA.astype(jnp.float64)
    op, other = (
        cx.hessian(functools.partial(loss, function=f), params, data) for f in (scanned, unrolled)
    )
    assert calls_put(op) >= 6
    assert error(dense(op), dense(other)) <= 1e-6  # the roundoff of products in float32


@native
def test_products_are_linear_where_jax_transforms_them():
    op = cx.hessian(scanned, parameters(), DATA)
    n = op.shape[0]
    block = jax.random.normal(jax.random.key(2), (4, 1, n))
    product = jax.jit(op.product)
    each = jnp.stack([product(one) for one in block])
    assert error(jax.vmap(op.product)(block), each) <= 1e-5
    _, tangent = jax.jvp(op.product, (block[0],), (block[1],))
    assert error(tangent, each[1]) <= 1e-5


@native
def test_a_product_needs_less_memory():
    wide = {"v": jnp.ones((12, 300, 300)) / 300, "w": jnp.ones((12, 300, 300)) / 300}

    def loss(params, x):
        def layer(x, p):
            return jnp.tanh(jnp.tanh(x @ p["v"]) @ p["w"]), None

        return jnp.mean(lax.scan(layer, x, params)[0] ** 2)

    op = cx.hessian(loss, wide, jnp.ones((2, 300)))

    def temporary():
        lowered = jax.jit(op.product).lower(jnp.zeros((1, op.shape[0])))
        return lowered.compile().memory_analysis().temp_size_in_bytes / (4 * op.shape[0])

    assert temporary() < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_product, "_MOST", 0)
        jax.clear_caches()
        assert temporary() > 1  # the leaf, and the stack of the results
    jax.clear_caches()


@native
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("start, size", [(0, 1), (0, 11), (5, 6), (3, 0), (70_000, 230_001)])
def test_put(x64, dtype, start, size):
    out = jnp.arange(max(11, start + size)).astype(dtype)
    part = -jnp.arange(1, size + 1).astype(dtype)
    found = jax.jit(put)(out, part, jnp.int32(start))
    wanted = np.asarray(out).copy()
    wanted[start : start + size] = part
    assert np.asarray(found).tobytes() == wanted.tobytes()
    assert np.asarray(out)[start] == np.asarray(jnp.asarray(start, dtype))  # not written over


@native
def test_put_refuses_to_write_elsewhere():
    with pytest.raises(Exception, match="the part reaches beyond the vector"):
        jax.block_until_ready(jax.jit(put)(jnp.ones(5), jnp.ones(3), jnp.int32(3)))


@native
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1, (4 << 20) + 3), (3, 6_000_019)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros(shape, dtype):
    for _ in range(2):  # of memory that was in use before
        found = np.array(jax.jit(zeros, static_argnums=(0, 1))(shape, dtype))
        assert found.shape == shape and found.dtype == dtype and not found.astype(np.float32).any()
        jax.block_until_ready(jnp.full(shape, jnp.nan, dtype))


@native
def test_an_uninitialised_array_is_one_of_each():
    shapes = jax.eval_shape(jax.vmap(uninitialised_like), jnp.ones((4, 3)))
    assert shapes.shape == (4, 3)
    _, tangent = jax.jvp(uninitialised_like, (jnp.ones(3),), (jnp.ones(3),))
    assert not np.asarray(tangent).any()
