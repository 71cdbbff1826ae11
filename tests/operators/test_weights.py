"""Batches that weigh what they should not, and parameters of several dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx


def _quadratic(params, batch):
    return jnp.sum(batch["scale"] * params**2) / 2, batch["weight"]


@pytest.mark.parametrize("weight", [-1.0, np.inf, np.nan])
def test_impossible_weights(weight):
    batches = [
        {"scale": jnp.float32(1), "weight": jnp.float32(3)},
        {"scale": jnp.float32(2), "weight": jnp.float32(weight)},
    ]
    with pytest.raises(ValueError, match="finite and not negative, got .* on batch 1"):
        cx.hessian(_quadratic, jnp.ones(3), batches)


def _mean(params, batch):
    return jnp.mean(batch["x"]) * jnp.sum(params**2) / 2


def test_no_length_to_weigh_a_batch_by():
    batches = [{"classes": jnp.zeros(3), "x": jnp.ones(length)} for length in (10, 50)]
    with pytest.raises(ValueError, match=r"leading lengths, here \[3, 10\].*\(mean, weight\)"):
        cx.hessian(_mean, jnp.ones(2), batches)
    # Alone it needs no weight, but it cannot be split.
    op = cx.hessian(_mean, jnp.ones(2), batches[0])
    np.testing.assert_array_equal(op @ jnp.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=r"microbatch_size.*one leading length.*\[3, 10\]"):
        cx.hessian(_mean, jnp.ones(2), batches[0], microbatch_size=20)


@pytest.mark.parametrize("linearize", [True, False])
def test_leaves_of_two_dtypes(linearize):
    with jax.enable_x64(True):
        params = {"a": jnp.ones(3, jnp.float32), "b": jnp.full(2, 2.0, jnp.float64)}

        def loss(params, batch):
            total = jnp.sum(params["a"].astype(jnp.float64) ** 3) + jnp.sum(params["b"] ** 4)
            return batch[0] * total

        op = cx.hessian(loss, params, jnp.ones(1, jnp.float64), linearize=linearize)
        assert op.dtype == np.float64
        product = op @ {"a": jnp.ones(3, jnp.float64), "b": jnp.ones(2, jnp.float64)}
        np.testing.assert_allclose(product["a"], np.full(3, 6.0), rtol=1e-6)
        np.testing.assert_allclose(product["b"], np.full(2, 48.0), rtol=1e-14)
        result = cx.eigsh(op, 2, seed=0)
        np.testing.assert_allclose(result.eigenvalues, [48, 48], rtol=1e-12)


def test_scipy_gets_the_transpose_too():
    op = cx.hessian(_mean, jnp.ones(2), {"x": jnp.full(4, 3.0)})
    np.testing.assert_array_equal(op.to_scipy().T @ np.ones(2), [3, 3])
