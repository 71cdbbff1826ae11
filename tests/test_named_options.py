"""Options of public functions: declared once, and a misspelt one is answered with a guess."""

import dataclasses
import inspect
import re
import typing

import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import losses, nn, options
from curvax.estimators.diagonal import DiagonalOptions
from curvax.estimators.trace import TraceOptions
from curvax.krylov.request import EigshOptions, PlanOptions, Request
from curvax.options import annotation_text

A = np.diag([3.0, 2, 1]).astype(np.float32)

PUBLIC = {
    name: value
    for module in (cx, losses, nn)
    for name in module.__all__
    if inspect.isfunction(value := getattr(module, name))
}
WITH_OPTIONS = sorted(
    name
    for name, function in PUBLIC.items()
    if any(p.kind is p.KEYWORD_ONLY for p in inspect.signature(function).parameters.values())
)


def options_of(function):
    """Names, annotations and defaults of the keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def declared(options):
    hints = typing.get_type_hints(options, include_extras=True)
    return {
        name: (annotation_text(hint.__origin__), hint.__metadata__[0])
        for name, hint in hints.items()
    }


@pytest.mark.parametrize(
    "function, declaration",
    [
        (cx.eigsh, EigshOptions),
        (Request.of, EigshOptions),
        (cx.trace, TraceOptions),
        (cx.diagonal, DiagonalOptions),
    ],
)
def test_signatures_are_made_of_one_declaration(function, declaration):
    assert options_of(function) == declared(declaration)


def test_plan_takes_options_of_eigsh():
    assert declared(PlanOptions).items() <= declared(EigshOptions).items()
    own = {"basis_dtype", "limit"}
    assert options_of(cx.plan).keys() == PlanOptions.__annotations__.keys() | own
    rest = {name: entry for name, entry in options_of(cx.plan).items() if name not in own}
    assert rest == declared(PlanOptions)


@pytest.mark.parametrize(
    "function, declaration",
    [(cx.eigsh, EigshOptions), (cx.trace, TraceOptions), (cx.diagonal, DiagonalOptions)],
)
def test_overloads_name_the_declaration(function, declaration):
    overloads = typing.get_overloads(inspect.unwrap(function))
    assert len(overloads) == 2
    for overload in overloads:
        assert overload.__annotations__["options"] == f"Unpack[{declaration.__name__}]"


def test_a_request_holds_every_option():
    fields = {field.name for field in dataclasses.fields(Request)}
    assert fields == EigshOptions.__annotations__.keys() - {"which"} | {"wanted"}


def test_help_shows_names_types_and_defaults():
    text = re.sub(r"\s+", " ", str(inspect.signature(cx.eigsh)))
    assert "k: int | tuple[int, int], *, which: Literal['LM', 'LA', 'SA', 'BE'] = 'LM'" in text
    assert "tol: float = 0.001" in text and "return_eigenvectors: bool = True" in text
    assert "Find k extreme eigenpairs" in cx.eigsh.__doc__


def test_the_functions_with_options():
    assert set(WITH_OPTIONS) >= {"eigsh", "hessian", "trace", "solve", "mse", "power_iteration"}


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_a_misspelt_option_names_its_neighbour(name):
    function = PUBLIC[name]
    for option in options_of(function):
        wrong = option + "q"
        with pytest.raises(
            TypeError, match=rf"^{name} has no argument '{wrong}': did you mean "
        ) as e:
            function(**{wrong: 1})
        assert re.search(rf"\b{option}\b", str(e.value).split(":")[1])


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_an_argument_given_twice_is_named(name):
    function = PUBLIC[name]
    first = next(iter(inspect.signature(function).parameters))
    with pytest.raises(
        TypeError, match=f"^{name} got {first} twice, as argument 1 and as {first}="
    ):
        function(A, **{first: A})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cx.eigsh(A, kk=3), r"eigsh has no argument 'kk': did you mean k\?"),
        (lambda: cx.eigsh(A, 1, zz=20), "eigsh has no argument 'zz': it has A, k, which, tol, "),
        (lambda: cx.eigsh(A, 1, "LA"), "eigsh takes A and k by position, got 3 .* such as which="),
        (lambda: cx.identity(A, 1), "identity takes like by position, got 2 arguments there$"),
        (lambda: cx.eigsh(A), "missing 1 required positional argument: 'k'"),
        (lambda: cx.plan(A, 1, limits=3), r"plan has no argument 'limits': did you mean limit\?"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_blocks_take_the_same_options():
    blocks = cx.identity({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}).blocks(1)
    with pytest.raises(TypeError, match=r"eigsh has no argument 'whic': did you mean which\?"):
        cx.eigsh(blocks, 1, whic="LA")
    results = cx.eigsh(blocks, 1, seed=7)
    assert {result.seed for result in results.values()} == {7}


def test_options_that_another_function_takes_may_have_any_name():
    @options.takes_options()
    def function(first, second=2, **others):
        return first, second, others

    assert function(1, train=False) == (1, 2, {"train": False})
    with pytest.raises(TypeError, match="function got first twice, as argument 1 and as first="):
        function(1, train=False, first=3)
    with pytest.raises(
        TypeError, match="takes first and second by position, got 3 arguments there$"
    ):
        function(1, 2, 3, train=False)


def quadratic(params, batch):
    return jnp.mean((batch @ params) ** 2)


P, B = jnp.ones(3), jnp.eye(3)
MODEL = cx.Model(P, lambda params, batch: batch @ params, lambda z, batch: jnp.mean(z**2))
OP = cx.hessian(quadratic, P, B)
CALLS = {
    "at has no argument 'batch': did you mean batches?": lambda: OP.at(P, batch=B),
    "at takes params by position, got 2 arguments there: .* such as batches=": lambda: OP.at(P, B),
    "at got params twice, as argument 1 and": lambda: OP.at(P, params=P),
    "at has no argument 'param'": lambda: (2 * OP).at(param=P),
    "blocks has no argument 'stack': did you mean stacked?": lambda: OP.blocks(1, stack="a"),
    "restrict has no argument 'were': did you mean where?": lambda: OP.restrict(were="w"),
    "save has no argument 'pat'": lambda: cx.eigsh(A, 1).save(pat="x"),
    "load has no argument 'file'": lambda: cx.load(file="x"),
    "eigsh has no argument 'maxiter': did you mean max_matvecs": lambda: cx.eigsh(A, 1, maxiter=3),
    "eigsh has no argument 'ncv': did you mean max_basis": lambda: cx.eigsh(A, 1, ncv=3),
    "solve has no argument 'tolerance': did you mean tol": lambda: cx.solve(A, P, tolerance=1),
    r"hessian\(model, batches\) has no argument 'batch': did": lambda: cx.hessian(MODEL, batch=B),
    r"hessian\(model, batches\) has no argument 'params'": lambda: cx.hessian(MODEL, B, params=P),
    r"ggn\(model, batches\) has no argument 'loss'": lambda: cx.ggn(MODEL, B, loss=len),
    "takes the batches after a Model .*, got 0 arguments": lambda: cx.fisher(MODEL),
    "takes the batches after a Model .*, got 2 arguments": lambda: cx.ggn(MODEL, B, batches=B),
}


@pytest.mark.parametrize("message", CALLS)
def test_methods_and_calls_with_a_model_name_what_was_meant(message):
    with pytest.raises(TypeError, match=message):
        CALLS[message]()


def test_a_model_may_be_given_by_the_name_of_what_it_stands_for():
    wanted = 2 / 3 * np.eye(3)
    for op in (cx.hessian(loss=MODEL, batches=B), cx.ggn(forward=MODEL, batches=B)):
        np.testing.assert_allclose(op.product(jnp.eye(3)), wanted, rtol=1e-6)
