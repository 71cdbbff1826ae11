"""Models and losses with `custom_vjp` functions: taken where that is possible, else named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import losses

EPS = 2.0**-23


@jax.custom_vjp
def t5x_cross_entropy(logits, targets, z_loss):
    """Written as in T5X: the derivative from saved exponentials, in plain JAX."""
    return _forward(logits, targets, z_loss)[0]


def _forward(logits, targets, z_loss):
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    shifted = logits - top
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_softmax = shifted - jnp.log(total)
    log_z = jnp.squeeze(jnp.log(total) + top, axis=-1)
    loss = -jnp.sum(targets * log_softmax, axis=-1) + z_loss * jnp.square(log_z)
    return loss, (exponentials, total, targets, log_z, z_loss)


def _backward(saved, g):
    exponentials, total, targets, log_z, z_loss = saved
    derivative = (1 + 2 * z_loss * log_z)[:, None] * exponentials / total - targets
    return g[:, None] * derivative, jnp.zeros_like(targets), jnp.zeros_like(z_loss)


t5x_cross_entropy.defvjp(_forward, _backward)


@jax.custom_vjp
def flash_attention(q, k, v):
    """A fused forward and backward, with no derivative of the latter, as of a vendor's library."""
    return jax.nn.softmax(q @ k.T, axis=-1) @ v


def _opaque(saved, g):
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in saved)
    return jax.pure_callback(lambda *a: tuple(np.asarray(x) for x in a[:3]), shapes, *saved, g)


flash_attention.defvjp(lambda q, k, v: (flash_attention(q, k, v), (q, k, v)), _opaque)


@pytest.fixture
def problem(rng):
    params = {
        "w": jnp.asarray(rng.normal(size=(5, 6)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=(6, 9)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    return params, (x, jnp.asarray(rng.integers(0, 9, 12), jnp.int32))


def forward(params, batch):
    return jnp.tanh(batch[0] @ params["w"]) @ params["h"]


def t5x(outputs, batch):
    targets = jax.nn.one_hot(batch[1], 9, dtype=jnp.float32)
    return jnp.mean(t5x_cross_entropy(outputs, targets, jnp.float32(1e-2)))


def ours(outputs, batch):
    return losses.softmax_cross_entropy(outputs, batch[1], z_loss=1e-2)


def dense(op):
    return np.asarray(op.product(jnp.eye(op.shape[0], dtype=op.dtype)), np.float64)


@pytest.mark.parametrize("linearize", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_loss_as_in_t5x(linearize, problem):
    pairs = [
        (
            cx.hessian(lambda p, b, f=f: f(forward(p, b), b), *problem, linearize=linearize),
            cx.ggn(forward, f, *problem, linearize=linearize),
        )
        for f in (t5x, ours)
    ]
    for theirs, own in zip(*pairs, strict=True):
        want = dense(own)
        assert np.abs(dense(theirs) - want).max() <= 16 * EPS * np.abs(want).max()


@jax.custom_vjp
def clipped(x):
    """A layer of one's own, whose backward pass is plain JAX."""
    return jnp.tanh(x)


clipped.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


@pytest.mark.parametrize("linearize", [True, False])
def test_a_layer_with_a_differentiable_backward_pass(linearize, problem):
    def custom(params, batch):
        return clipped(batch[0] @ params["w"]) @ params["h"]

    want = dense(cx.ggn(forward, ours, *problem))
    got = dense(cx.ggn(custom, ours, *problem, linearize=linearize))
    assert np.abs(got - want).max() <= 16 * EPS * np.abs(want).max()


def attend(params, batch):
    q = batch[0] @ params["w"]
    return flash_attention(q, q, q) @ params["h"]


def test_an_opaque_attention_is_named(problem):
    for make in (
        lambda: cx.hessian(lambda p, b: ours(attend(p, b), b), *problem),
        lambda: cx.hessian(lambda p, b: ours(attend(p, b), b), *problem, linearize=False),
        lambda: cx.ggn(attend, ours, *problem),
        lambda: cx.ggn(jax.checkpoint(attend), ours, *problem, linearize=False),
    ):
        with pytest.raises(TypeError, match="flash_attention at .*test_custom_vjp.py") as caught:
            make()
        message = str(caught.value)
        assert "is a jax.custom_vjp function" in message
        assert "implementation='xla'" in message and "curvax.losses" in message


@jax.custom_vjp
def opaque_loss(logits, labels):
    return jnp.mean(-jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def _opaque_loss_backward(saved, g):
    shape = jax.ShapeDtypeStruct(saved.shape, saved.dtype)
    return jax.pure_callback(lambda z, g: np.asarray(z), shape, saved, g), None


opaque_loss.defvjp(lambda z, y: (opaque_loss(z, y), z), _opaque_loss_backward)


def test_an_opaque_loss_is_named(problem):
    def loss(outputs, batch):
        return opaque_loss(outputs, batch[1])

    with pytest.raises(TypeError, match="the loss cannot be.*twice: opaque_loss at"):
        cx.ggn(forward, loss, *problem)
