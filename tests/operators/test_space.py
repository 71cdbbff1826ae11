"""Vectors and flat arrays: conversion both ways, and how an operator prints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

LIKE = {"m": np.zeros((2, 3), np.float32), "s": np.zeros((), np.float32)}


@pytest.fixture
def op():
    return cx.from_matvec(lambda v: jax.tree.map(lambda x: 2 * x, v), LIKE)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 7)])
def test_ravel_is_the_inverse_of_unravel(op, shape):
    flat = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tree = op.unravel(flat)
    assert tree["m"].shape == (*shape[:-1], 2, 3) and tree["s"].shape == shape[:-1]
    np.testing.assert_array_equal(op.ravel(tree), flat)
    np.testing.assert_array_equal(op.ravel(op @ tree), 2 * flat)


@pytest.mark.parametrize("shape", [(), (6,), (2, 8), (2, 2, 7)])
def test_flat_array_of_another_shape(op, shape):
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"flat .* shape \(7,\) or \(b, 7\), got {got}"):
        op.unravel(np.zeros(shape, np.float32))


def test_block_whose_leaves_have_different_lengths(op):
    with pytest.raises(ValueError, match=r"leaf 's' of vector must have shape \(3,\), got \(2,\)"):
        op.ravel({"m": jnp.zeros((3, 2, 3)), "s": jnp.zeros(2)})


def test_complex_vector(op):
    with pytest.raises(TypeError, match="leaf 's' of vector must be real, got complex64"):
        op.ravel({"m": jnp.zeros((2, 3)), "s": 1j})


def test_printed_in_one_short_line(op):
    assert repr(op) == "FunctionOperator(shape=(7, 7), dtype=float32, leaves: m, s)"
    params = {f"layer{i}": np.ones(50, np.float32) for i in range(9)}
    hessian = cx.hessian(
        lambda p, x: sum(jnp.sum(w**2) for w in p.values()) * jnp.mean(x),
        params, np.ones(5, np.float32),
    )  # fmt: skip
    assert repr(hessian) == (
        "Hessian(shape=(450, 450), dtype=float32, "
        "leaves: layer0, layer1, layer2, layer3, and 5 more, "
        "batches=1, samples=5, weight=5, loss=450)"
    )
    flat = cx.from_matvec(lambda v: v, 3)
    assert repr(flat) == "FunctionOperator(shape=(3, 3), dtype=float32)"
