"""What a linearised product keeps: nothing twice, and nothing in the shape it is spread to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.jaxprs import origins

LAYERS, ROWS, WIDTH = 3, 5, 4


def problem(dtype):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal((LAYERS, WIDTH, WIDTH)) / 2, dtype)
    return params, jnp.asarray(rng.standard_normal((ROWS, WIDTH)), dtype)


def chain(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, params)
    return jnp.sum(x**2)


def spread(params, x):
    """A mean for each row, and a number, that are broadcast; a look-up, whose gradient is zeros."""
    w = params[0]
    y = x @ w
    y = y * jnp.mean(y, axis=1, keepdims=True) * jnp.sum(w)
    return jnp.sum(y[jnp.asarray([0, 2, 2])] ** 2)


@pytest.mark.parametrize("loss", [chain, spread])
def test_products(loss):
    with jax.enable_x64(True):
        params, x = problem(np.float64)
        n = params.size
        dense = jax.hessian(lambda flat: loss(flat.reshape(params.shape), x))(params.ravel())
        op = cx.hessian(loss, params, x, linearize=True)
        np.testing.assert_allclose(
            op.product(jnp.eye(n)), dense, atol=1e-13 * np.abs(dense).max(), rtol=0
        )


def test_a_stack_that_a_scan_returns_twice_is_kept_once():
    """Per layer: input, sine, two derivatives, upstream gradient, and that times the first."""
    op = cx.hessian(chain, *problem(np.float32), linearize=True)
    assert op.residual_bytes <= (6 * LAYERS + 1) * ROWS * WIDTH * 4


def test_what_is_broadcast_is_kept_as_it_was_before():
    op = cx.hessian(spread, *problem(np.float32), linearize=True)
    shapes = [residual.shape for residual in jax.tree.leaves(op.stacks[0].product.residuals)]
    assert {(ROWS, 1), (ROWS,)} & {*shapes}
    # The zeros into which the gradient of the look-up is added.
    assert shapes.count((ROWS, WIDTH)) <= 4


def test_origins():
    """Equal for what is the same, and for nothing else: not what is carried, nor constants."""

    def fun(x, stack):
        def step(carry, entry):
            y = carry + entry
            return y, (y, y, entry, entry + 1, carry, x)

        last, made = jax.lax.scan(step, x, stack)
        return last, *made, stack, x

    jaxpr = jax.make_jaxpr(fun)(jnp.ones(2), jnp.ones((3, 2))).jaxpr
    origin = origins(jaxpr)
    last, y, again, entry, more, carry, constant, stack, x = map(origin, jaxpr.outvars)
    assert y == again and entry == stack
    assert len({last, y, entry, more, carry, constant, x}) == 7
