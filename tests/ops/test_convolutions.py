"""Convolutions in loops: with their axes in the order that XLA:CPU computes fast, and right."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import curvax as cx
from curvax import _native
from curvax.jax_internals import ClosedJaxpr, convolution_axes, jaxpr_as_fun
from curvax.jaxprs import equations
from curvax.ops.fence.convolutions import in_fast_order

native = pytest.mark.skipif(not _native.available(), reason="built without the compiled module")

KEYS = jax.random.split(jax.random.key(0), 3)
SPACE = "DHW"
# Dimension numbers of one, two and three axes of space, and options.
CASES = {
    "NCH OIH": ("NCH", "OIH", "NCH", {}),
    "NHC HIO": ("NHC", "HIO", "NHC", {"window_strides": (2,)}),
    "NCHW OIHW": ("NCHW", "OIHW", "NCHW", {"padding": "SAME"}),
    "CHWN IHWO": ("CHWN", "IHWO", "HWNC", {"rhs_dilation": (2, 1)}),
    "dilated": ("NCHW", "OIHW", "NHWC", {"lhs_dilation": (2, 3)}),
    "grouped": ("NCHW", "HWIO", "NCHW", {"feature_group_count": 2}),
    "batch groups": ("HWNC", "OIHW", "NCHW", {"batch_group_count": 2}),
    "NCDHW": ("NCDHW", "IODHW", "NDHWC", {"padding": "SAME"}),
}


def operands(lhs, rhs, options):
    groups = options.get("feature_group_count", 1)
    sizes = {"N": 2, "C": 4, "I": 4 // groups, "O": 6, "D": 5, "H": 6, "W": 7}
    kernel = {**sizes, "D": 2, "H": 3, "W": 2}
    x = jax.random.normal(KEYS[0], [sizes[axis] for axis in lhs])
    return x, jax.random.normal(KEYS[1], [kernel[axis] for axis in rhs])


@pytest.mark.parametrize("name", CASES)
def test_values_and_the_order_of_axes(name):
    lhs, rhs, out, options = CASES[name]
    x, w = operands(lhs, rhs, options)
    options = {
        "window_strides": (1,) * (len(lhs) - 2),
        "padding": [(1, 0)] * (len(lhs) - 2),
        **options,
    }
    convolve = functools.partial(
        lax.conv_general_dilated, dimension_numbers=(lhs, rhs, out), precision="highest", **options
    )
    found = in_fast_order(jax.make_jaxpr(convolve)(x, w).jaxpr)
    (axes,) = filter(None, map(convolution_axes, equations(found)))
    last = len(lhs) - 1
    space = tuple(range(1, last))
    assert axes == ((0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space))
    truth = convolve(x, w)
    (value,) = jaxpr_as_fun(ClosedJaxpr(found, []))(x, w)
    assert value.shape == truth.shape
    assert np.abs(value - truth).max() <= 1e-5 * np.abs(truth).max()


def network(params, batch):
    x, labels = batch
    order = ("NCHW", "OIHW", "NCHW")
    for w in params["convolutions"]:
        x = lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=order)
        x = jnp.tanh(x)
    return cx.losses.softmax_cross_entropy(x.mean((2, 3)) @ params["out"], labels)


@native
@pytest.mark.parametrize("linearize", [True, False])
def test_products_of_microbatches(linearize):
    keys = jax.random.split(KEYS[2], 4)
    params = {
        "convolutions": [
            jax.random.normal(keys[0], (4, 2, 3, 3)) / 4,
            jax.random.normal(keys[1], (3, 4, 2, 3)) / 4,
        ],
        "out": jax.random.normal(keys[2], (3, 3)),
    }
    batch = jax.random.normal(keys[3], (12, 2, 7, 6)), jnp.arange(12) % 3
    whole = cx.hessian(network, params, batch, linearize=linearize)
    op = cx.hessian(network, params, batch, linearize=linearize, microbatch_size=4)
    block = jax.random.normal(KEYS[0], (1, op.shape[0]))
    compiled = jax.jit(op.product).lower(block).compile()
    orders = set(re.findall(r" convolution\(.*dim_labels=([\w>-]+)", compiled.as_text()))
    assert orders == {"b01f_01io->b01f"}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, batch[0], block))
        exact = cx.hessian(network, wide[0], (wide[1], batch[1]))
        truth = np.asarray(exact.product(wide[2]))
    for found in (compiled(block), whole.product(block)):
        assert np.abs(found - truth).max() <= 1e-5 * np.abs(truth).max()
