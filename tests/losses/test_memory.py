"""`linear_cross_entropy` holds no array of tokens × vocabulary: what the compiler says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from curvax import losses

GB = 1e9

# Plain JAX, in place of the kernel, holds some more arrays of a chunk.
pytestmark = pytest.mark.usefixtures("native_kernels")


def hvp(hidden, head, labels, u, v):
    def f(slots):
        return losses.linear_cross_entropy(*slots, labels)

    return jax.jvp(jax.grad(f), ((hidden, head),), ((u, v),))[1]


def linearized(hidden, head, labels, u, v):
    def f(slots):
        return losses.linear_cross_entropy(*slots, labels)

    return jax.linearize(jax.grad(f), (hidden, head))[1]((u, v))


def primal_half(hidden, head, labels):
    def f(slots):
        return losses.linear_cross_entropy(*slots, labels)

    return jax.linearize(jax.grad(f), (hidden, head))[1]


def block(hidden, head, labels, u, v):
    return jax.vmap(lambda a, b: hvp(hidden, head, labels, a, b))(u, v)


def compiled(fun, rows, width, vocab, tangents=()):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    args = [array(rows, width), array(vocab, width), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    args += [array(*tangents, rows, width), array(*tangents, vocab, width)]
    return jax.jit(fun).lower(*args[: fun.__code__.co_argcount]).compile().memory_analysis()


@pytest.mark.parametrize("fun", [hvp, linearized])
@pytest.mark.parametrize(
    "rows,width,vocab,limit", [(16384, 768, 50304, 0.2), (8192, 2304, 256000, 0.8)]
)
def test_products(fun, rows, width, vocab, limit):
    analysis = compiled(fun, rows, width, vocab)
    assert analysis.temp_size_in_bytes <= limit * GB
    # The results, and no more: hidden states and head.
    assert analysis.output_size_in_bytes <= 4 * width * (rows + vocab) + 1000


def test_a_vocabulary_that_slices_do_not_divide():
    assert compiled(hvp, 16384, 768, 50257).temp_size_in_bytes <= 0.2 * GB


def test_residuals_have_no_logits():
    """Of the primal half: hidden states, head, labels, and the gradient in the hidden states."""
    rows, width, vocab = 16384, 768, 50304
    analysis = compiled(primal_half, rows, width, vocab)
    inputs_and_gradient = 4 * (2 * rows * width + vocab * width + 4 * rows)
    assert analysis.output_size_in_bytes <= inputs_and_gradient + 1000
    assert analysis.temp_size_in_bytes <= 0.2 * GB


def test_a_block_of_tangents_is_bounded_too():
    """Chunks shrink as the block grows: the logits and their tangents stay within 0.54 GB."""
    for b in (4, 16):
        analysis = compiled(block, 4096, 256, 50304, tangents=(b,))
        hidden_tangents = 4 * b * 4096 * 256
        assert analysis.temp_size_in_bytes - 2 * hidden_tangents <= 0.54 * GB
