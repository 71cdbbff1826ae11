"""Hessians that are zero: differentiation drops the whole product, and with it the residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
PARAMS = {"a": np.arange(1, 4, dtype=np.float32), "b": np.asarray(0.5, np.float32)}

LOSSES = {
    "constant": (lambda p, x: jnp.float32(3), None),
    "no parameter": (lambda p, x: jnp.mean(x), None),
    "linear": (lambda p, x: jnp.mean(x @ p["a"]) + p["b"], None),
    "linear in the chosen": (
        lambda p, x: jnp.mean(jnp.tanh(x) @ p["a"]) * jnp.exp(p["b"]),
        cx.match_names("a"),
    ),
}


@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_products_are_exactly_zero(name, microbatch, linearize):
    loss, where = LOSSES[name]
    op = cx.hessian(loss, PARAMS, X, where=where, microbatch_size=microbatch, linearize=linearize)
    eye = jnp.eye(op.shape[0], dtype=jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda op, v: op.product(v))(op, eye), 0)
    assert op.residual_bytes == 0
    np.testing.assert_allclose(op.loss, loss(PARAMS, X), rtol=1e-5)
