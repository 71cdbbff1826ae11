"""What the losses refuse, and what they say of it."""

from __future__ import annotations

import re

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
    ({"softcap": 0}, ValueError, "softcap must be positive or None, got 0"),
    ({"softcap": -2.0}, ValueError, "softcap must be positive or None, got -2.0"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer, got 1.0"),
]
SOFTMAX = [
    ({"logits": np.zeros((4, 7), int)}, TypeError, "logits must be real and floating, got dtype"),
    ({"logits": np.float32(0)}, ValueError, "logits must have shape (..., V)"),
    ({"logits": np.zeros((4, 0), np.float32)}, ValueError, "with V > 0, got (4, 0)"),
]
LINEAR = [
    ({"head": W[:, :2]}, ValueError, "the width D = 3 of hidden, got (7, 2)"),
    ({"head": W.T}, ValueError, "got (3, 7); it looks transposed: pass head.T"),
    ({"head": W[0]}, ValueError, "head must have shape (V, D)"),
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
