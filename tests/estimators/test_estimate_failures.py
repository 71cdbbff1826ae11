"""Memory that an estimate, or the making of an operator, lacks: in XLA's own words, and in ours."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.operators import curvature

N = 6
ASKED = "(RESOURCE_EXHAUSTED|INTERNAL): .*Out of memory .*bytes"


def huge(x):
    """0, by way of 17.6 TB, which a sort needs."""
    column = x * jnp.arange(1 << 21, dtype=jnp.float32)[:, None]
    return jnp.sort(column * jnp.ones((1, 1 << 21)), axis=0)[0, 0]


OP = cx.from_matvec(lambda v: 2 * v + huge(v[0]), N)
CALLS = {
    "trace": (lambda: cx.trace(OP, num_matvecs=4, block_size=2), "lower block_size, or use method"),
    "hutchinson": (lambda: cx.trace(OP, method="hutchinson", block_size=1), None),
    "diagonal": (lambda: cx.diagonal(OP, num_matvecs=4, block_size=2), "lower block_size"),
    "spectral_density": (lambda: cx.spectral_density(OP, block_size=2), "lower block_size"),
    "log_det": (lambda: cx.log_det(OP, block_size=1), None),
    "lanczos_tridiagonal": (
        lambda: cx.lanczos_tridiagonal(OP, 3, return_basis=True),
        "lower num_steps",
    ),
    "power_iteration": (lambda: cx.power_iteration(OP, 2), "lower k"),
    "solve": (lambda: cx.solve(OP, np.ones(N, np.float32)), None),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_estimate(name):
    call, remedy = CALLS[name]
    with pytest.raises(MemoryError) as caught:
        call()
    # What it takes is known where the program of the product could be compiled.
    known = r"(, and a product takes [\d.]+ GB)?"
    last = "" if remedy is None else rf"\. {remedy}"
    pattern = rf"memory ran out \({ASKED}.*\): [\d.]+ [GM]B are free{known}{last}"
    assert re.match(pattern, str(caught.value)), caught.value
    assert caught.value.result is None


def test_what_a_product_takes():
    with pytest.raises(MemoryError, match=r"and a product takes 1759\d.* GB"):
        cx.power_iteration(OP)


def test_sharpness_that_is_followed():
    start = cx.sharpness(cx.from_matvec(lambda v: 2 * v, N))
    with pytest.raises(MemoryError, match=rf"memory ran out \({ASKED}"):
        cx.sharpness(OP, start)


def test_the_making_of_an_operator():
    def loss(params, batch):
        return jnp.mean(batch["x"] @ params) ** 2 + huge(params[0])

    with pytest.raises(MemoryError) as caught:
        cx.hessian(loss, jnp.ones(3), {"x": jnp.ones((4, 3))})
    remedies = "take smaller microbatches .*, or keep no"
    pattern = rf"memory ran out when the loss was evaluated \({ASKED}.*are free\. {remedies}"
    assert re.match(pattern, str(caught.value))


def test_an_operator_that_moves(monkeypatch):
    def loss(params, batch):
        return jnp.mean(batch["x"] @ params) ** 2

    op = cx.hessian(loss, jnp.ones(3), {"x": jnp.ones((4, 3))}, linearize=True)

    def evaluate(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(curvature, "_evaluate", evaluate)
    pattern = rf"when the loss was evaluated \({ASKED}.*smaller microbatches .* keep no linear"
    with pytest.raises(MemoryError, match=pattern):
        op.at(2 * jnp.ones(3))


def test_what_a_product_in_python_raises_in_its_second_run():
    calls = iter([np.float32(2)] * 3)
    matrix = np.diag(np.arange(1, N + 1, dtype=np.float32))

    class Lacking:
        shape, dtype = (N, N), np.dtype(np.float32)

        def matvec(self, v):
            if next(calls, None) is None:
                raise OSError("no more")
            return matrix @ v

    with pytest.raises(OSError, match="no more"):
        cx.solve(Lacking(), np.ones(N, np.float32))
