"""A model in one object, in place of its parts."""

import inspect
import pydoc
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.operators.fisher import FisherOptions
from curvax.operators.ggn import GaussNewtonOptions
from curvax.operators.hessian import HessianOptions

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"a": jax.random.normal(KEYS[0], (3, 4)), "b": jax.random.normal(KEYS[1], (4, 2))}
BATCH = (jax.random.normal(KEYS[2], (6, 3)), jax.random.normal(KEYS[3], (6, 2)))
LOSS = cx.losses.MeanSquaredError(lambda batch: batch[1])


def forward(params, batch):
    return jnp.tanh(batch[0] @ params["a"]) @ params["b"]


MODEL = cx.Model(PARAMS, forward, LOSS, {"a": "a", "first.weight": "a", "b": "b"})


def same(one, other):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, one.shape[0])), jnp.float32)
    np.testing.assert_array_equal(one.product(x), other.product(x))


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"where": cx.match_names("b")}])
def test_operators_of_a_model_are_those_of_its_parts(options):
    same(
        cx.hessian(MODEL, BATCH, **options),
        cx.hessian(lambda p, b: LOSS(forward(p, b), b), PARAMS, BATCH, **options),
    )
    same(cx.ggn(MODEL, BATCH, **options), cx.ggn(forward, LOSS, PARAMS, BATCH, **options))
    options = options | {"kind": "exact"}
    same(
        cx.fisher(MODEL, batches=BATCH, **options),
        cx.fisher(forward, LOSS, PARAMS, BATCH, **options),
    )


def test_filters_know_all_names():
    for where in (cx.match_names("first.*"), lambda name, leaf: name == "first.weight"):
        assert cx.hessian(MODEL, BATCH, where=where).space.names == ("a",)
    with pytest.raises(ValueError, match=r"'c' matches no name"):
        cx.hessian(MODEL, BATCH, where=cx.match_names("c"))
    mask = {"a": False, "b": True}
    assert cx.hessian(MODEL, BATCH, where=mask).space.names == ("b",)


def test_text():
    assert repr(MODEL) == "Model(20 parameters in 2 leaves)"
    assert cx.hessian.__name__ == "hessian" and "forward over reverse" in cx.hessian.__doc__


OPTIONS = {cx.hessian: HessianOptions, cx.ggn: GaussNewtonOptions, cx.fisher: FisherOptions}


@pytest.mark.parametrize("function", OPTIONS, ids=lambda function: function.__name__)
def test_help_shows_that_a_model_is_accepted_and_the_types_of_options(function):
    """The options of the overloads, for a model and for its parts, are those of the function."""
    parameters = inspect.signature(function).parameters.values()
    hints = typing.get_type_hints(function)
    first, *rest = (p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    assert cx.Model in typing.get_args(hints[first.name]) and rest[-1].name == "batches"
    options = {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert (
        options == typing.get_type_hints(OPTIONS[function]) and typing.Any not in options.values()
    )
    # Python 3.13 breaks long signatures into lines.
    text = " ".join(pydoc.plain(pydoc.render_doc(function)).split()).replace("( ", "(")
    assert f"{function.__name__}({first.name}: " in text and "Model, " in text
    assert "microbatch_size: Microbatches = None" in text
    assert f"{function.__name__}(model, batches, ...)" in text


def test_bad_input():
    with pytest.raises(TypeError, match=r"Model\(forward=\.\.\.\) must be callable as forward"):
        cx.Model(PARAMS, 3, LOSS)
    with pytest.raises(TypeError, match=r"Model\(loss=\.\.\.\) must be callable as loss\(outputs"):
        cx.Model(PARAMS, forward, "mse")
    with pytest.raises(TypeError, match=r"Model\(name_map=\.\.\.\)"):
        cx.Model(PARAMS, forward, LOSS, ["a"])
    with pytest.raises(TypeError, match=r"hessian\(model, batches\) .* got 0"):
        cx.hessian(MODEL)
    with pytest.raises(TypeError, match=r"ggn\(model, batches\) .* got 2"):
        cx.ggn(MODEL, PARAMS, BATCH)
