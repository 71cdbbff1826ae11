"""Models whose samples mix, or do not, and batches for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Of each sample the activations are longer than the parameters.
SAMPLES, LENGTH, WIDTH = 6, 24, 4


def make_params(rng):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]))

    return {
        "in": normal(WIDTH, WIDTH),
        "layers": normal(2, WIDTH, WIDTH),
        "scale": 1 + normal(WIDTH),
        "kernel": normal(3, WIDTH, WIDTH),
        "out": normal(WIDTH, 3),
    }


def make_batch(rng):
    return {
        "x": jnp.asarray(rng.normal(size=(SAMPLES, LENGTH, WIDTH))),
        "tokens": jnp.asarray(rng.integers(0, WIDTH, (SAMPLES, LENGTH)), jnp.int32),
        "labels": jnp.asarray(rng.integers(0, 3, (SAMPLES, LENGTH)), jnp.int32),
        "scalar": jnp.asarray(0.5),
    }


def wide(x):
    """Activations enough for gradients to be the shorter."""
    for _ in range(4):
        x = jnp.tanh(jnp.sin(x))
    return x


def model(layer):
    """A model around `layer(params, x, batch)`, from `(N, T, d)` to the same."""

    def forward(params, batch):
        x = wide(batch["x"] @ params["in"])
        return wide(layer(params, x, batch)) @ params["out"]

    return forward


def attention(x, axis):
    """Of the elements along an axis, within what the others hold apart."""
    x = jnp.moveaxis(x, axis, 1)
    scores = jnp.einsum("nqd,nkd->nqk", x, x)
    return jnp.moveaxis(jnp.einsum("nqk,nkd->nqd", jax.nn.softmax(scores), x), 1, axis)


def heads(x):
    n, t, d = x.shape
    x = x.reshape(n, t, 2, d // 2).transpose(0, 2, 1, 3)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), x @ jnp.swapaxes(x, -1, -2), -1e9)
    return (jax.nn.softmax(scores) @ x).transpose(0, 2, 1, 3).reshape(n, t, d)


def norm(x, axis, scale):
    centred = x - jnp.mean(x, axis, keepdims=True)
    scale = jnp.broadcast_to(scale, x.shape)
    return scale * centred * lax.rsqrt(jnp.mean(centred**2, axis, keepdims=True) + 1e-3)


def merged(params, x):
    n, t, d = x.shape
    return jnp.tanh(x.reshape(n * t, d) @ params["layers"][0]).reshape(n, t, d)


def scanned(params, x, step=lambda x, w: jnp.tanh(x @ w)):
    return lax.scan(lambda x, w: (step(x, w), None), x, params["layers"])[0]


def convolved(params, x, layout=("NWC", "WIO", "NWC")):
    return lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=layout)


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME")


def routed(params, x, axis):
    """The two elements along an axis that score best, by a gate."""
    gate = jax.nn.softmax(jnp.moveaxis(x, axis, -1))
    best, _ = lax.top_k(gate, 2)
    return x * jnp.moveaxis(best.sum(-1, keepdims=True), -1, axis)


def recurrent(params, x):
    def step(state, entry):
        state = jnp.tanh(state @ params["layers"][0] + entry)
        return state, state

    start = jnp.zeros((x.shape[0], x.shape[2]), x.dtype)
    return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=True)[1], 0, 1)


def dropout(x):
    return x * jax.random.bernoulli(jax.random.key(0), 0.7, x.shape).astype(x.dtype)


def one_by_one(function):
    return lambda params, x, batch: jax.vmap(lambda x: function(params, x))(x)


def backward_is_forward(fun):
    """As `fun`, with a `custom_vjp` rule that can itself be differentiated."""
    ruled = jax.custom_vjp(fun)
    ruled.defvjp(lambda x: (fun(x), x), lambda x, g: jax.vjp(fun, x)[1](g))
    return ruled


@jax.custom_jvp
def doubled(x):
    return jnp.sin(x)


@doubled.defjvp
def _doubled(primals, tangents):
    return jnp.sin(primals[0]), 2 * tangents[0]


@jax.custom_jvp
def centred_backwards(x):
    return jnp.sin(x)


@centred_backwards.defjvp
def _centred(primals, tangents):
    return jnp.sin(primals[0]), tangents[0] - jnp.mean(tangents[0], 0, keepdims=True)


@jax.custom_vjp
def centred_by_vjp(x):
    return x


centred_by_vjp.defvjp(lambda x: (x, None), lambda _, g: (g - jnp.mean(g, 0, keepdims=True),))


def fixed(x, *shape):
    """Numbers that a model closes over."""
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), x.dtype)


APART = {
    "layers": lambda p, x, b: jnp.tanh(x @ p["layers"][0]),
    "scan over layers": lambda p, x, b: scanned(p, x),
    "checkpoint": lambda p, x, b: scanned(p, x, jax.checkpoint(lambda x, w: jnp.tanh(x @ w))),
    "attention": lambda p, x, b: x + attention(x, 1),
    "heads": lambda p, x, b: x + heads(x),
    "layer norm": lambda p, x, b: norm(x, -1, p["scale"]),
    "group norm": lambda p, x, b: norm(x, (1, 2), p["scale"]),
    "merged tokens": lambda p, x, b: merged(p, x),
    "merged after others": lambda p, x, b: merged(
        p, jnp.swapaxes(jnp.swapaxes(x, 1, 2) @ fixed(x, LENGTH, LENGTH), 1, 2) + x[:, :1]
    ),
    "embedding": lambda p, x, b: x + p["in"][b["tokens"]],
    "one hot": lambda p, x, b: x + jax.nn.one_hot(b["tokens"], WIDTH) @ p["in"],
    "take_along_axis": lambda p, x, b: x * jnp.take_along_axis(x, b["tokens"][..., None], -1),
    "convolution": lambda p, x, b: convolved(p, x),
    "convolution, other layout": lambda p, x, b: jnp.swapaxes(
        convolved(p, jnp.swapaxes(x, 1, 2), ("NCW", "WIO", "NCW")), 1, 2
    ),
    "pooling": lambda p, x, b: pooled(x @ p["layers"][0]),
    "vmap": one_by_one(lambda p, x: jnp.tanh(x @ p["layers"][0])),
    "vmap of convolution": one_by_one(lambda p, x: convolved(p, x[None])[0]),
    "vmap of take": one_by_one(lambda p, x: x * x[jnp.argmax(x[:, 0])][None]),
    "vmap of scan": one_by_one(scanned),
    "recurrent": lambda p, x, b: recurrent(p, x),
    "samples in the middle": lambda p, x, b: jnp.swapaxes(
        jnp.tanh(jnp.swapaxes(x, 0, 1) @ p["layers"][0]), 0, 1
    ),
    "dropout": lambda p, x, b: dropout(x @ p["layers"][0]),
    "a number for each sample": lambda p, x, b: x * jnp.arange(1.0, SAMPLES + 1)[:, None, None],
    "divided by the samples": lambda p, x, b: x / x.shape[0],
    "a constant with samples": lambda p, x, b: x * fixed(x, *x.shape),
    "sort and cumsum within": lambda p, x, b: jnp.sort(x, 1) + jnp.cumsum(x, 1) + x[:, ::-1],
    "argsort within": lambda p, x, b: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "roll and pad within": lambda p, x, b: jnp.roll(x, 1, 1)
    + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, 1:],
    "top-k within": lambda p, x, b: routed(p, x, 2),
    "split": lambda p, x, b: jnp.concatenate(jnp.split(x, 2, 2)[::-1], 2),
    "cond": lambda p, x, b: lax.cond(p["out"][0, 0] > 9, lambda x: jnp.zeros_like(x), jnp.sin, x),
    "while loop of data": lambda p, x, b: x * lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, lax.stop_gradient(x))
    )[1],
    "update": lambda p, x, b: lax.dynamic_update_slice(jnp.zeros_like(x), x[:, :9], (0, 2, 0)),
    "dynamic slice": lambda p, x, b: x + lax.dynamic_slice(x, (0, 3, 0), (SAMPLES, 1, WIDTH)),
    "custom_jvp": lambda p, x, b: doubled(jax.nn.relu(x)),
    "custom_vjp": lambda p, x, b: backward_is_forward(jnp.sin)(x),
    "unused statistics": lambda p, x, b: (x @ p["layers"][0], jnp.mean(x, 0))[0],
    "no data": lambda p, x, b: fixed(x, *x.shape) @ p["layers"][0],
    "a scalar of the batch": lambda p, x, b: x * b["scalar"].astype(x.dtype),
}  # fmt: skip


def batch_norm(params, x, batch):
    return norm(x, (0, 1), params["scale"])


def capacity(params, x, batch):
    """A router in which experts take a limited number of tokens, whosever they are."""
    place = jnp.cumsum((x[..., :1] > 0).reshape(-1, 1), 0).reshape(*x.shape[:2], 1)
    return jnp.where(place < 30, x, 0.5 * x)


MIXED = {
    "batch norm": batch_norm,
    "batch norm in a scan": lambda p, x, b: scanned(p, x, lambda x, w: norm(x @ w, 0, 1.0)),
    "batch norm in a checkpoint": lambda p, x, b: jax.checkpoint(
        functools.partial(norm, axis=0, scale=1.0)
    )(x),
    "attention over samples": lambda p, x, b: x + attention(x, 0),
    "mean subtracted": lambda p, x, b: x - jnp.mean(x, 0, keepdims=True),
    "maximum": lambda p, x, b: x / jnp.max(x),
    "every pair": lambda p, x, b: jnp.einsum("ntd,mtd->nm", x, x)[:, :1, None] * x,
    "samples contracted": lambda p, x, b: x @ jnp.einsum("ntd,nte->de", x, x),
    "contracted with a constant": lambda p, x, b: x
    + jnp.einsum("ntd,n->td", x, fixed(x, SAMPLES))[None],
    "transposed": lambda p, x, b: x + jnp.sum(
        x[:, :SAMPLES] * jnp.swapaxes(x[:, :SAMPLES], 0, 1), 1, keepdims=True
    ),
    "outer product": lambda p, x, b: x + jnp.sum(x[:, :1, 0] * x[None, :, 0, 0], 1)[:, None, None],
    "interleaved": lambda p, x, b: jnp.swapaxes(x, 0, 1).reshape(SAMPLES, LENGTH, WIDTH),
    "reshaped across": lambda p, x, b: x.reshape(LENGTH, SAMPLES, WIDTH).swapaxes(0, 1),
    "cumsum": lambda p, x, b: jnp.cumsum(x, 0),
    "roll": lambda p, x, b: x + jnp.roll(x, 1, 0),
    "sort": lambda p, x, b: jnp.sort(x, 0),
    "flip": lambda p, x, b: x + x[::-1],
    "permuted": lambda p, x, b: x + x[jnp.array([1, 0, 3, 2, 5, 4])],
    "permuted by data": lambda p, x, b: x + x[b["tokens"][:, 0]],
    "one sample for all": lambda p, x, b: x + x[:1],
    "dynamic slice": lambda p, x, b: x + lax.dynamic_slice_in_dim(x, 3, 1, 0),
    "scan over samples": lambda p, x, b: lax.scan(lambda c, x: (c + x, c + x), 0 * x[0], x)[1],
    "top-k over samples": lambda p, x, b: routed(p, x, 0),
    "capacity": capacity,
    "a branch by all": lambda p, x, b: lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x),
    "a loop by all": lambda p, x, b: x * lax.while_loop(
        lambda c: jnp.sum(c) > 3, lambda c: 0.5 * c, lax.stop_gradient(jnp.abs(x))
    ),
    "tangents alone": lambda p, x, b: centred_backwards(x),
    "cotangents alone": lambda p, x, b: centred_by_vjp(x),
    "padded": lambda p, x, b: x + jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1],
    "pooling over samples": lambda p, x, b: lax.reduce_window(
        x, -jnp.inf, lax.max, (3, 1, 1), (1, 1, 1), "SAME"
    ),
    "convolution over samples": lambda p, x, b: jnp.swapaxes(
        convolved(p, jnp.swapaxes(x, 0, 1)), 0, 1
    ),
    "samples as features": lambda p, x, b: jnp.moveaxis(
        jnp.moveaxis(x, 0, -1) @ fixed(x, SAMPLES, SAMPLES), -1, 0
    ),
    "argmax over samples": lambda p, x, b: x * jnp.argmax(x, 0)[None].astype(x.dtype),
    "updated": lambda p, x, b: x + lax.dynamic_update_slice(x, x[:2], (1, 0, 0)),
    "a product of batches": lambda p, x, b: jnp.einsum("ntd,nte->tde", x, x)[None, :, 0] + x,
    "gram": lambda p, x, b: (x[:, 0] @ x[:, 0].T)[:, :1, None] + x,
}  # fmt: skip
