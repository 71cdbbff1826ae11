"""Models and losses whose Fisher matrices are tested, and those matrices from single samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from curvax import losses

EPS = 2.0**-23
CLASSES = 11


def labels_of(batch):
    return batch["labels"]


def weights_of(batch):
    return batch.get("weights")


def hidden(params, batch):
    return jnp.tanh(batch["x"] @ params["w"].astype(batch["x"].dtype))


def logits(params, batch):
    head, bias = (params[name].astype(batch["x"].dtype) for name in "hb")
    out = hidden(params, batch) @ head.T
    return out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)


def no_logits(params, batch):
    return hidden(params, batch), params["h"], params["b"]


def no_bias(params, batch):
    return hidden(params, batch), params["h"]


def without_bias(params, batch):
    return hidden(params, batch) @ params["h"].astype(batch["x"].dtype).T


@pytest.fixture(name="params")
def small_params(rng):
    shapes = {"w": (5, 8), "h": (CLASSES, 8), "b": (CLASSES,)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def make_batch(rng, *shape, weights=True, masked=True):
    """Samples of unequal numbers of labels, one of them without any."""
    labels = rng.integers(0, CLASSES, shape).astype(np.int32)
    if masked:
        labels[rng.uniform(size=shape) < 0.3] = -100
        labels[1], labels[0] = -100, 3
    batch = {"x": jnp.asarray(rng.normal(size=(*shape, 5)), jnp.float32), "labels": labels}
    if weights:
        batch["weights"] = jnp.asarray(rng.uniform(0.1, 2, shape), jnp.float32)
    return batch


def row_loss(z, label, cap=None, z_loss=0.0, smoothing=0.0):
    z = z if cap is None else cap * jnp.tanh(z / cap)
    lse = jax.nn.logsumexp(z)
    return lse - (1 - smoothing) * z[label] - smoothing * jnp.mean(z) + z_loss * lse**2


def truth(forward, params, batches, **options):
    """`(1/W) Σ_i x_i x_iᵀ` with `x_i = ∇ Σ_t sqrt(w_t) l_t`, by `vmap(grad)` in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), params)
        flat, unravel = ravel_pytree(wide)

        def of_sample(flat, x, labels, roots):
            z = forward(unravel(flat), {"x": x[None]}).reshape(-1, CLASSES)
            rows = jax.vmap(lambda z, y: row_loss(z, y, **options))(z, labels.reshape(-1))
            return jnp.sum(roots.reshape(-1) * rows)

        total, weight = np.zeros((flat.size, flat.size)), 0.0
        for batch in batches if isinstance(batches, list) else [batches]:
            labels = np.asarray(batch["labels"])
            w = np.asarray(batch.get("weights", np.ones(labels.shape)), np.float64)
            w = np.where(labels == -100, 0.0, w)
            x = jnp.asarray(np.asarray(batch["x"], np.float64))
            gradient = jax.vmap(jax.grad(of_sample), (None, 0, 0, 0))
            g = np.asarray(gradient(flat, x, np.maximum(labels, 0), jnp.sqrt(jnp.asarray(w))))
            total += g.T @ g
            weight += w.sum()
        return total / weight


def dense(op):
    return np.asarray(multiply(op, jnp.eye(op.shape[0], dtype=op.dtype)), np.float64)


@jax.jit
def multiply(op, block):
    return op.product(block)


def assert_is(op, want, tolerance=16 * EPS):
    got, scale = dense(op), np.linalg.norm(want, 2)
    assert np.abs(got - want).max() <= tolerance * scale
    assert np.abs(got - got.T).max() <= 4 * EPS * scale
    assert np.linalg.eigvalsh((got + got.T) / 2)[0] >= -16 * EPS * scale


def mean_of_any(outputs, batch):
    """A loss that is no class of ours: NaN, as is its gradient, for a sample without labels."""
    # Integers: XLA makes a choice of a product with a bool, and then no NaN comes through.
    kept = jnp.clip(batch["labels"] + 1, 0, 1)
    index = jnp.maximum(batch["labels"], 0)[..., None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(outputs), index, -1)[..., 0]
    weight = kept.sum()
    total = jnp.sum(kept.astype(outputs.dtype) * picked)
    return -total / weight.astype(outputs.dtype), weight


def by_function(outputs, batch):
    return losses.softmax_cross_entropy(outputs, batch["labels"], return_weight=True)


ours, linear = (
    losses.SoftmaxCrossEntropy(labels_of, weights_of),
    losses.LinearCrossEntropy(labels_of, weights_of, chunk=7),
)
CASES = {
    "any loss": (logits, mean_of_any),
    "fused function": (logits, by_function),
    "fused object": (logits, ours),
    "no logits": (no_logits, linear),
    "no logits, no bias": (no_bias, linear),
}
