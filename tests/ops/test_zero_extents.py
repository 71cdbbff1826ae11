"""What handlers and losses do with arrays that have no elements: nothing, or an error that says so.

The handlers are called directly: the functions in front of them refuse some of these themselves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import _native
from curvax.ops.block_ortho import ffi as block_ortho
from curvax.ops.block_ortho.arguments import Arguments
from curvax.ops.softmax_ce import Options, reference
from curvax.ops.softmax_ce import ffi as softmax_ce

OPTIONS = Options(z_loss=0.1, label_smoothing=0.1)


def softmax_arguments(rows, vocab, tangents):
    logits = jnp.ones((rows, vocab))
    labels, weights = jnp.zeros(rows, jnp.int32), jnp.ones(rows)
    return logits, jnp.ones((tangents, rows, vocab)), labels, weights, OPTIONS


@pytest.fixture
def handlers(native_kernels):
    """Registered, as they are before the first choice of a kernel."""
    assert _native.available()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("tangents", [0, 3])
@pytest.mark.parametrize("rows", [0, 3])
def test_softmax_ce_without_rows_or_tangents(rows, tangents):
    arguments = softmax_arguments(rows, 5, tangents)
    got = (softmax_ce.hvp(*arguments), *softmax_ce.derivatives(*arguments))
    want = (reference.hvp(*arguments), *reference.derivatives(*arguments))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.usefixtures("handlers")
def test_softmax_ce_without_classes_is_refused():
    """There would be losses, of no class."""
    with pytest.raises(Exception, match=r"must have a class, got shape \(3,0,\)"):
        jax.block_until_ready(softmax_ce.derivatives(*softmax_arguments(3, 0, 2)))


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)], ids=str)
def test_a_basis_without_elements_is_refused(shape):
    rows, n = shape
    expected = rf"basis must have shape \(rows, n\), at least 1 each, got \({rows},{n},\)"
    zero = jnp.int32(0)
    with jax.enable_x64(True):
        basis, block = jnp.zeros(shape, jnp.float32), jnp.zeros((1, n), jnp.float32)
        with pytest.raises(Exception, match=expected):
            jax.block_until_ready(
                block_ortho.orthonormalize_block(
                    Arguments(basis, block, zero, jnp.zeros(2, jnp.uint32), 1.0, 0.0)
                )
            )
        # XLA does not call what has no results with elements.
        rotated = block_ortho.rotate_basis(basis, jnp.zeros((rows, rows)), zero, zero)
        assert rotated.shape == shape


def test_cross_entropies_of_no_rows_have_weight_0(monkeypatch, impl):
    monkeypatch.setenv("CURVAX_IMPL", {"ffi": "auto"}.get(impl, impl))
    hidden, head, labels = jnp.ones((0, 4)), jnp.ones((5, 4)), jnp.zeros(0, jnp.int32)

    def linear(hidden, head):
        return cx.losses.linear_cross_entropy(hidden, head, labels, return_weight=True)

    def materialised(hidden, head):
        return cx.losses.softmax_cross_entropy(hidden @ head.T, labels, return_weight=True)

    for loss in (linear, materialised):

        def total(*slots, loss=loss):
            mean, weight = loss(*slots)
            return jnp.where(weight > 0, weight * mean, 0.0)

        value, gradient = jax.value_and_grad(total, (0, 1))(hidden, head)
        product = jax.jvp(jax.grad(total, (0, 1)), (hidden, head), (hidden, head))[1]
        assert value == 0
        for d_hidden, d_head in (gradient, product):
            assert d_hidden.shape == (0, 4)
            assert np.array_equal(d_head, np.zeros((5, 4)))
