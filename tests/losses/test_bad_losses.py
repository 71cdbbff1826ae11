"""What the losses refuse, and what they say of it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import losses

X = np.zeros((4, 3), np.float32)
W = np.zeros((7, 3), np.float32)
Y = np.array([0, 6, -100, 2])


def softmax(**given):
    arguments = {"logits": np.zeros((4, 7), np.float32), "labels": Y, **given}
    return losses.softmax_cross_entropy(arguments.pop("logits"), **arguments)


def linear(**given):
    arguments = {"hidden": X, "head": W, "labels": Y, **given}
    return losses.linear_cross_entropy(**arguments)


BOTH = [
    ({"labels": np.array([0, 7, 1, 2])}, ValueError, "labels must be in [0, V) with V = 7, or"),
    ({"labels": np.array([0, 1, -1, 2])}, ValueError, "got -1 at (2,)"),
    ({"labels": np.full(4, -100)}, ValueError, "of which all are ignore_index = -100"),
    ({"labels": Y[:3]}, ValueError, "labels must have shape (4,)"),
    ({"labels": Y[None]}, ValueError, "got (1, 4)"),
    ({"labels": Y.astype(np.float32)}, TypeError, "labels must be integers, got dtype float32"),
    ({"weights": np.ones(3, np.float32)}, ValueError, "weights must have the shape of labels"),
    ({"weights": np.ones(4, np.complex64)}, TypeError, "weights must be real"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1], got 1.5"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
    ({"z_loss": jnp.ones(())}, TypeError, "z_loss must be a number known when"),
    ({"z_loss": np.inf}, ValueError, "z_loss must be finite"),
    (
        {"softcap": 1e300},
        ValueError,
        "softcap must be in [1.1e-19, 1e+31] for a computation in float32",
    ),
    ({"z_loss": -1e300}, ValueError, "z_loss must be at most 3.4e+38 for a computation in float32"),
    ({"softcap": 0}, ValueError, "softcap must be positive or None, got 0"),
    ({"softcap": -2.0}, ValueError, "softcap must be positive or None, got -2.0"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer, got 1.0"),
    ({"ignore_index": 2**40}, ValueError, "ignore_index must fit in 32 bits"),
    # Which JAX would wrap around to 3.
    ({"labels": np.array([0, 1, 2**32 + 3, 2])}, ValueError, "got 4294967299 at (2,)"),
]
SOFTMAX = [
    ({"logits": np.zeros((4, 7), int)}, TypeError, "logits must be real and floating, got dtype"),
    ({"logits": np.float32(0)}, ValueError, "logits must have shape (..., V)"),
    ({"logits": np.zeros((4, 0), np.float32)}, ValueError, "with V > 0, got (4, 0)"),
]
LINEAR = [
    ({"head": W[:, :2]}, ValueError, "D = 3 of hidden, and neither V nor D 0, got (7, 2)"),
    ({"head": W.T}, ValueError, "got (3, 7); it looks transposed: pass head.T"),
    ({"head": W[0]}, ValueError, "head must have shape (V, D)"),
    ({"head": W[:0]}, ValueError, "and neither V nor D 0, got (0, 3)"),
    ({"head": W.astype(int)}, TypeError, "head must be real and floating"),
    ({"hidden": X.astype(complex)}, TypeError, "hidden must be real and floating"),
    ({"hidden": np.float32(0)}, ValueError, "hidden must have shape (..., D), got a scalar"),
    ({"bias": np.zeros(6, np.float32)}, ValueError, "bias must have shape (V,) = (7,), got (6,)"),
    ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
    ({"chunk": -3}, ValueError, "chunk must be at least 1, got -3"),
    ({"chunk": 2.0}, TypeError, "chunk must be 'auto' or an integer, got 2.0"),
    ({"chunk": True}, TypeError, "chunk must be 'auto' or an integer, got True"),
    ({"chunk": "tiny"}, ValueError, "chunk must be 'auto' or an integer, got 'tiny'"),
]


@pytest.mark.parametrize(
    "fun,given,kind,message",
    [
        *((fun, *case) for case in BOTH for fun in (softmax, linear)),
        *((softmax, *case) for case in SOFTMAX),
        *((linear, *case) for case in LINEAR),
    ],
)
def test_refused(fun, given, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        fun(**given)


def test_accepted():
    for labels in (Y, Y.astype(np.int8), jnp.asarray(Y)):
        np.testing.assert_allclose(softmax(labels=labels), np.log(7), rtol=1e-6)
        np.testing.assert_allclose(linear(labels=labels), np.log(7), rtol=1e-6)
    unsigned = np.array([0, 6, 1, 2], np.uint8)
    np.testing.assert_allclose(linear(labels=unsigned), np.log(7), rtol=1e-6)


@pytest.mark.parametrize("bad", [2**32 + 3, 2**32 - 100, -(2**40)])
@pytest.mark.parametrize("fun", [softmax, linear])
def test_wide_labels_are_not_wrapped_around(fun, bad):
    with jax.enable_x64(True):
        f = jax.jit(lambda y: fun(labels=y))
        labels = np.array([0, 6, -100, 2])
        np.testing.assert_allclose(f(jnp.asarray(labels)), np.log(7), rtol=1e-6)
        labels[1] = bad
        assert np.isnan(f(jnp.asarray(labels)))
        if bad >= 0:
            unsigned = jnp.asarray([0, 6, bad % 2**32, 2], jnp.uint32)
            assert np.isnan(f(unsigned)) == (bad % 2**32 > 6)


@pytest.mark.parametrize("fun", [softmax, linear])
def test_a_mean_over_no_label(fun):
    none = {"logits": np.zeros((0, 7), np.float32)} if fun is softmax else {"hidden": X[:0]}
    with pytest.raises(ValueError, match="must have one to count, got none: a mean over none is"):
        fun(labels=Y[:0], **none)
    assert np.isnan(jax.jit(lambda y: fun(labels=y, **none))(Y[:0]))
    mean, weight = fun(labels=Y[:0], return_weight=True, **none)
    assert np.isnan(mean) and weight == 0


def test_mse():
    with pytest.raises(ValueError, match=re.escape("shape of outputs, (4, 3), got (4,)")):
        losses.mse(X, X[:, 0])
    with pytest.raises(ValueError, match="weights must have the shape of outputs"):
        losses.mse(X, X, weights=np.ones(3, np.float32))
    with pytest.raises(TypeError, match="outputs must be real and floating"):
        losses.mse(X.astype(int), X)


def test_objects():
    loss = losses.LinearCrossEntropy(labels=lambda batch: batch)
    with pytest.raises(ValueError, match="outputs must be a tuple .hidden, head. or"):
        loss(X, Y)
    with pytest.raises(ValueError, match="got tuple of 4"):
        loss.hessian_product((X, W, W, W), Y, None)
    with pytest.raises(TypeError, match="^labels must be a function of the batch"):
        losses.LinearCrossEntropy(labels=Y)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        losses.LinearCrossEntropy(labels=lambda batch: batch, chunk=0)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        losses.SoftmaxCrossEntropy(labels=lambda batch: batch, label_smoothing=2)
    loss = losses.SoftmaxCrossEntropy(labels=lambda batch: batch)
    with pytest.raises(TypeError, match="for .hidden, head. use LinearCrossEntropy"):
        loss((X, W), Y)
    with pytest.raises(TypeError, match="got a tuple; for .hidden, head."):
        loss.hessian_product((X, W), Y, None)
