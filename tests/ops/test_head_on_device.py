"""The products with a language model's head as they are lowered for a CUDA device."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir

import curvax as cx
from curvax.losses import linear_cross_entropy
from curvax.operators.hessian import HessianMap
from curvax.ops.matmul_sum import matmul_sum

TOKENS, WIDTH, VOCAB = 8192, 768, 50304


@pytest.fixture
def on_device(monkeypatch):
    """As where JAX's default device is a CUDA device without curvax's kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("CURVAX_IMPL", "reference")


def lowered(function, *arguments):
    fresh = jax.jit(lambda *args: function(*args))  # not what another test has traced
    return fresh.trace(*arguments).lower(lowering_platforms=("cuda",))


def executed(lowered_program) -> collections.Counter[str]:
    """How often each operation runs in one run of a program: loops count as often as they go."""
    module = lowered_program.compiler_ir()
    functions = {op.name.value: op for op in module.body.operations}
    counts: collections.Counter[str] = collections.Counter()

    def visit(block, times):
        for op in block.operations:
            name = op.operation.name.removeprefix("stablehlo.")
            counts[name] += times
            if name == "func.call":
                callee = ir.FlatSymbolRefAttr(op.operation.attributes["callee"]).value
                visit(functions[callee].regions[0].blocks[0], times)
            inner = times * trips(op) if name == "while" else times
            for region in op.operation.regions:
                for inside in region.blocks:
                    visit(inside, inner)

    visit(functions["main"].regions[0].blocks[0], 1)
    return counts


def trips(loop) -> int:
    """Of a loop that counts up from 0 by 1 to a constant."""
    test = loop.operation.regions[0].blocks[0]
    (compare,) = [op for op in test.operations if op.operation.name == "stablehlo.compare"]
    bound = compare.operation.operands[1]
    if isinstance(bound.owner, ir.Block):  # carried through the loop
        bound = loop.operation.operands[ir.BlockArgument(bound).arg_number]
    value = ir.DenseElementsAttr(bound.owner.attributes["value"])
    return int(np.asarray(value))


def loss(params, batch):
    hidden = batch["x"] @ params["mix"]
    return linear_cross_entropy(hidden, params["head"], batch["y"])


def product_of(vocab, tokens=TOKENS):
    """The lowered Hessian product of a model with a head, and how many chunks that goes over."""
    shape = jax.ShapeDtypeStruct
    leaves = (shape((vocab, WIDTH), np.float32), shape((WIDTH, WIDTH), np.float32))
    batch = {"x": shape((tokens, WIDTH), np.float32), "y": shape((tokens,), np.int32)}
    treedef = jax.tree.structure({"head": 0, "mix": 0})
    product = HessianMap(treedef, {}, (True, True), False, loss).recomputing(leaves, batch)
    program, before, after = product.program(leaves, batch)
    return lowered(program, before, leaves, after)


def test_products_of_a_language_model_head_are_counted_in_chunks(on_device, monkeypatch):
    """At 8192 tokens 4 chunks of 2048 rows, 7 products each; on a CPU slices of 32 chunks."""
    outside = 5  # products with the matrix `mix`
    assert executed(product_of(VOCAB))["dot_general"] == 4 * 7 + outside
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert executed(product_of(VOCAB))["dot_general"] > 2816


def test_chunks_keep_the_logits_of_a_large_vocabulary_within_their_bytes(on_device):
    text = product_of(262_144).as_text()
    rows = 2**31 // (2 * 262_144 * 4)
    assert f"tensor<{rows}x262144xf32>" in text and "tensor<2048x262144xf32>" not in text


@pytest.mark.parametrize("count", [1, 2])
def test_a_sum_on_a_device_is_one_product_for_each_term(on_device, count):
    shape = jax.ShapeDtypeStruct
    term = (shape((2048, VOCAB), np.float32), shape((2048, WIDTH), np.float32))
    total = shape((VOCAB, WIDTH), np.float32)
    program = lowered(
        lambda terms, add_to: matmul_sum(
            *terms, add_to=add_to, transpose_a=True, precision="BF16_BF16_F32_X3"
        ),
        [term] * count,
        total,
    )
    counts = executed(program)
    assert counts["dot_general"] == counts["add"] == count and counts["while"] == 0
    assert counts["dynamic_slice"] == counts["dynamic_update_slice"] == 0
    assert program.as_text().count("num_primitive_operations = 3") == count


@pytest.mark.parametrize("preset,line", [
    (None, "precision = [DEFAULT, DEFAULT]"),
    ("highest", "precision = [HIGHEST, HIGHEST]"),
    ("BF16_BF16_F32_X3", "num_primitive_operations = 3"),
])  # fmt: skip
def test_the_precision_of_the_head_is_that_where_the_loss_is_traced(on_device, preset, line):
    """As of any layer of the user's: not where the program is compiled."""
    with jax.default_matmul_precision(preset):
        traced = jax.jit(lambda *args: jax.grad(loss)(*args)).trace(
            {"head": jnp.ones((40, 8)), "mix": jnp.ones((8, 8))},
            {"x": jnp.ones((6, 8)), "y": jnp.zeros(6, jnp.int32)},
        )
    with jax.default_matmul_precision("tensorfloat32"):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = [x for x in text.splitlines() if "dot_general" in x and "= [] x []" not in x]
    assert len(products) == 5 and all(line in x for x in products)


def test_float64_stays(on_device):
    with jax.enable_x64(True):
        a = jnp.ones((4, 5))
        text = lowered(lambda x: matmul_sum((x, x.T), precision="BF16_BF16_F32_X3"), a).as_text()
    assert "HIGHEST" in text and "f32" not in text


def test_on_a_device_the_numbers_are_the_same(on_device, rng, monkeypatch):
    """Evaluated on a CPU, where a product in place is in full precision."""
    hidden, head = rng.normal(size=(300, 8)), rng.normal(size=(40, 8))
    params = {"head": jnp.asarray(head, jnp.float32), "mix": jnp.eye(8)}
    batch = {"x": jnp.asarray(hidden, jnp.float32), "y": jnp.arange(300) % 40}
    vector = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params
    )
    on_a_device = cx.hessian(loss, params, batch) @ vector
    monkeypatch.undo()
    on_a_cpu = cx.hessian(loss, params, batch) @ vector
    for x, y in zip(*map(jax.tree.leaves, (on_a_device, on_a_cpu)), strict=True):
        np.testing.assert_allclose(x, y, atol=64 * np.finfo(np.float32).eps * np.abs(y).max())
