"""Products of which the transpose is taken are made in the other order, where that is the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.jax_internals import ClosedJaxpr, jaxpr_as_fun
from curvax.ops.fence.transposes import without_transposes

KEYS = jax.random.split(jax.random.key(0), 4)
A, B = jax.random.normal(KEYS[0], (5, 3)), jax.random.normal(KEYS[1], (5, 4))
C, D = jax.random.normal(KEYS[2], (2, 5, 3)), jax.random.normal(KEYS[3], (2, 5, 4, 6))


def weight_gradient(a, b):
    return jax.lax.dot_general(b, a, (((0,), (0,)), ((), ())), precision="highest").T


def of_a_sum(a, b):
    return (b.T @ a + (2 * b).T @ (a**2) + jnp.sin(b).T @ a).T


def several_axes(c, d):
    out = jax.lax.dot_general(d, c, (((0, 1), (0, 1)), ((), ())))
    return out.transpose(2, 0, 1)


def read_twice(a, b):
    out = b.T @ a
    return out.T, jnp.sum(out)


def part_of_a_sum(a, b):
    return (b.T @ a + jnp.ones((4, 3))).T


def another_order(c, d):
    out = jax.lax.dot_general(d, c, (((0, 1), (0, 1)), ((), ())))
    return out.transpose(1, 2, 0)


def with_batches(c):
    return jnp.einsum("bti,btj->bij", c, c).transpose(0, 2, 1)


def a_result_too(a, b):
    out = b.T @ a
    return out, out.T


@pytest.mark.parametrize(
    "fun, args, left",
    [
        (weight_gradient, (A, B), 0),
        (of_a_sum, (A, B), 3),  # of the operands
        (several_axes, (C, D), 0),
        (read_twice, (A, B), 2),
        (part_of_a_sum, (A, B), 2),
        (another_order, (C, D), 1),
        (with_batches, (C,), 1),
        (a_result_too, (A, B), 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_values_and_what_is_left(fun, args, left):
    closed = jax.make_jaxpr(fun)(*args)
    found = without_transposes(closed.jaxpr)
    names = [eqn.primitive.name for eqn in found.eqns]
    assert names.count("transpose") == left
    values = jaxpr_as_fun(ClosedJaxpr(found, closed.consts))(*args)
    for value, truth in zip(values, jax.tree.leaves(fun(*args)), strict=True):
        assert value.shape == truth.shape and value.dtype == truth.dtype
        assert np.abs(value - truth).max() <= 1e-5 * np.abs(truth).max()


def test_precisions_of_the_two_operands_change_places():
    precision = (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)

    def fun(a, b):
        return jax.lax.dot_general(b, a, (((0,), (0,)), ((), ())), precision=precision).T

    (eqn,) = without_transposes(jax.make_jaxpr(fun)(A, B).jaxpr).eqns
    assert eqn.params["precision"] == precision[::-1]
