"""Messages stay short whatever they are about, name adapters, and say what to do instead."""

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.checks import shown
from curvax.operators.checked_product import compiled_product
from curvax.operators.conversion import as_operator

MANY = {f"layer{i}": {"w": np.ones((50, 50), np.float32)} for i in range(300)}
X = np.ones((4, 2), np.float32)
PARAMS = {"w": np.ones(2, np.float32)}


def loss(params, batch):
    return jnp.mean((batch @ params["w"]) ** 2)


OP = cx.hessian(loss, PARAMS, X)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cx.hessian(MANY, loss, X),
        lambda: cx.ggn(MANY, loss, PARAMS, X),
        lambda: cx.ggn(loss, MANY, PARAMS, X),
        lambda: cx.fisher(loss, loss, MANY, X, kind="exact"),
        lambda: cx.fisher(loss, loss, PARAMS, X, num_samples=MANY),
        lambda: cx.hessian(loss, PARAMS, X, method=np.ones((300, 300))),
        lambda: cx.hessian(loss, PARAMS, X, linearize="x" * 10**5),
        lambda: cx.hessian(loss, PARAMS, X, microbatch_size=list(MANY.items())),
        lambda: cx.hessian(loss, PARAMS, X, where=MANY),
        lambda: cx.hessian(loss, PARAMS, X, where={"z" * 10**5: True}),
        lambda: cx.hessian(loss, PARAMS, [[], MANY]),
        lambda: cx.from_matvec(lambda v: MANY, 3),
        lambda: cx.from_matvec(lambda v: v, {"a": list(MANY)}),
        lambda: cx.identity({"a": list(MANY)}),
        lambda: cx.Model(PARAMS, MANY, loss),
        lambda: OP.at(MANY),
        lambda: OP.at(PARAMS, batches=[MANY]),
        lambda: OP @ MANY,
        lambda: OP + cx.identity(MANY),
        lambda: OP * MANY,
        lambda: OP.congruence(MANY),
        lambda: OP.blocks(MANY),
        lambda: cx.eigsh(OP, MANY),
        lambda: cx.eigsh(OP, 1, which=list(MANY)),
        lambda: cx.eigsh(OP, 1, v0="x" * 10**5),
        lambda: cx.eigsh(OP, 1, callback=MANY),
        lambda: cx.trace(OP, method=str(MANY)),
    ],
)
def test_messages_are_short(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert len(str(caught.value)) < 1200


def test_the_order_of_swapped_arguments_is_told():
    with pytest.raises(TypeError, match=r"got \{'layer0.*and 296 more\}; the order is hessian\(lo"):
        cx.hessian(MANY, loss, X)


def test_leaves_that_structures_differ_by_are_named():
    params = {name: MANY[name] for name in ("layer6", "layer7", "layer8")}
    op = cx.identity(params)
    with pytest.raises(ValueError, match="without 'layer7.w', with 'layer7.b'"):
        op @ {**params, "layer7": {"b": MANY["layer7"]["w"]}}


@pytest.mark.parametrize(
    "value, text",
    [
        (3, "3"),
        ("short", "'short'"),
        (np.float32(2), "np.float32(2.0)"),
        (np.zeros((2, 3)), "ndarray of shape (2, 3) and dtype float64"),
        ([1, [2, [3, [4]]]], "[1, [2, [...]]]"),
        ((1,), "(1,)"),
        (list(range(9)), "[0, 1, 2, 3, and 5 more]"),
        ({"a": 1}, "{'a': 1}"),
        ({}, "{}"),
        (np.float32, "<class 'numpy.float32'>"),
    ],
)
def test_shown(value, text):
    assert shown(value) == text


def framework(module, name="Module", **members):
    """An object of a class that derives from a framework's, without the framework."""
    base = type(name, (), {"__module__": module})
    return type("Net", (base,), {"__module__": "user", **members})()


MODULES = [
    (framework("torch.nn.modules.module"), "torch.from_module"),
    (framework("transformers.modeling_utils", "PreTrainedModel"), "huggingface.causal_lm"),
    (framework("keras.src.models.model", "Model"), "keras.from_model"),
    (framework("flax.nnx.module"), "flax.from_nnx"),
    (framework("flax.linen.module"), "flax.from_linen"),
    (framework("equinox._module._module"), "equinox.from_module"),
]


@pytest.mark.parametrize("module, adapter", MODULES)
def test_modules_of_other_frameworks_are_sent_to_their_adapters(module, adapter):
    message = rf"got a user\..*Net: make a model.*curvax\.adapters\.{adapter}\(module"
    for call in (
        lambda: cx.hessian(module, [X]),
        lambda: cx.ggn(module, [X]),
        lambda: cx.fisher(module, batches=[X]),
        lambda: (
            cx.hessian(module, loss, [X], microbatch_size=2)
            if "equinox" not in adapter
            else cx.hessian(module, batches=[X])
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match=rf"got a Net: make one of model = .*{adapter}.*hessian\("):
        cx.eigsh(module, 1)


def test_a_module_of_torch_as_parameters():
    with pytest.raises(TypeError, match=r"curvax\.adapters\.torch\.from_module"):
        cx.hessian(loss, MODULES[0][0], X)


def test_a_module_of_equinox_may_be_a_function():
    module = framework("equinox._module", __call__=lambda self, params, batch: loss(params, batch))
    assert float(cx.hessian(module, PARAMS, X).loss) == float(loss(PARAMS, X))


def test_a_model_is_no_operator():
    with pytest.raises(TypeError, match=r"got a Model: make one of model and batches"):
        cx.eigsh(cx.Model(PARAMS, lambda p, b: b, loss), 1)


@pytest.mark.parametrize(
    "op",
    [
        OP,
        2 * OP + cx.identity(OP),
        cx.from_matvec(lambda v: 2 * v, 3),
        OP.project_off(np.ones(2, np.float32)),
    ],
)
def test_pickling_an_operator_says_what_to_do_instead(op):
    with pytest.raises(TypeError, match=r"cannot be pickled.*Make it there anew.*result\.save"):
        pickle.dumps(op)
    n = op.shape[0]
    for same in (copy.copy(op), copy.deepcopy(op)):
        np.testing.assert_array_equal(
            compiled_product(same, jnp.eye(n)), compiled_product(op, jnp.eye(n))
        )


def test_what_holds_no_function_can_be_pickled():
    a = as_operator(np.diag(np.arange(1, 4, dtype=np.float32)))
    same = pickle.loads(pickle.dumps(2 * a + cx.identity(a)))
    np.testing.assert_array_equal(compiled_product(same, jnp.eye(3)), np.diag([3.0, 5.0, 7.0]))
