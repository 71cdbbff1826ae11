"""Losses that draw with a random key, typed or raw, wherever the key comes from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

PARAMS = {"w": jnp.array([1.0, -0.5, 2.0])}
X = jnp.arange(12.0).reshape(4, 3) / 6


def dropped(w, x, key):
    """A linear layer after dropout, of one mask for all samples."""
    return jnp.where(jax.random.bernoulli(key, 0.6, (3,)), x, 0.0) @ w


class Drawing:
    def __init__(self, key):
        self.key = key

    def __call__(self, params, x):
        return jnp.mean(dropped(params["w"], x, self.key) ** 4)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("options", [{}, {"linearize": False}, {"microbatch_size": 2}], ids=str)
@pytest.mark.parametrize("place", ["closed over", "attribute", "batch"])
def test_hessians_with_a_key(make, options, place):
    key = make(4)
    loss, batch = Drawing(key), X
    if place == "closed over":

        def loss(params, x):
            return jnp.mean(dropped(params["w"], x, key) ** 4)

    if place == "batch":
        batch, options = (X, key), {**options, "microbatch_size": None}

        def loss(params, batch):
            return jnp.mean(dropped(params["w"], *batch) ** 4)

    op = cx.hessian(loss, PARAMS, batch, **options)
    wanted = jax.hessian(lambda w: Drawing(key)({"w": w}, X))(PARAMS["w"])
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(op.product(jnp.eye(3)), wanted, rtol=0, atol=1e-5 * scale)
    values = cx.eigsh(op, 2, seed=0).eigenvalues
    np.testing.assert_allclose(values, np.linalg.eigvalsh(wanted)[:0:-1], atol=1e-5 * scale)


def test_keys_of_a_map_and_of_other_operators():
    keys = jax.random.split(jax.random.key(1), 3)
    scale = jax.vmap(jax.random.normal)(keys)
    op = cx.from_matvec(lambda v: v * jax.vmap(jax.random.normal)(keys) ** 2, 3)
    np.testing.assert_allclose(op.product(jnp.eye(3)), np.diag(np.square(scale)), rtol=1e-6)

    def forward(params, x):
        return dropped(params["w"], x, keys[0])

    def error(params, x):
        return jnp.mean(forward(params, x) ** 2)

    loss = cx.losses.MeanSquaredError(lambda x: jnp.zeros(len(x)))
    wanted = jax.hessian(lambda w: error({"w": w}, X))(PARAMS["w"])
    others = [
        cx.ggn(forward, loss, PARAMS, X),
        cx.hessian(error, PARAMS, X, method="finite_difference"),
    ]
    for op, atol in zip(others, (1e-6, 1e-3), strict=True):
        np.testing.assert_allclose(op.product(jnp.eye(3)), wanted, rtol=0, atol=atol)
