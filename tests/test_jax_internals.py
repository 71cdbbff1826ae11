"""What the rewrites recognise, counted, in the JAX that is there and under its settings."""

import dataclasses
import pathlib
import re
import subprocess
import sys
import tomllib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tests.conftest import requires_native

from curvax import jax_internals
from curvax.jaxprs import reads
from curvax.operators.closure import close
from curvax.operators.custom_vjp import check_linear, first_possible
from curvax.operators.precision import at_precision
from curvax.ops.fence import fence

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Each puts other primitives in the place of a kind. A JAX that has not all three has them
# unfinished: such a `custom_vjp` function has no linearisation there.
FLAGS = ("jax_custom_vjp3", "jax_custom_jvp3", "jax_remat3")
SETTINGS = [()]
if all(hasattr(jax.config, flag) for flag in FLAGS):
    SETTINGS += [*((flag,) for flag in FLAGS), FLAGS]


@pytest.fixture(params=SETTINGS, ids=lambda flags: "+".join(flags) or "off")
def flags(request):
    for flag in request.param:
        jax.config.update(flag, True)
    yield request.param
    for flag in request.param:
        jax.config.update(flag, False)


def custom_vjp(fun):
    """With a rule that is told from the derivative by its factor."""
    ruled = jax.custom_vjp(fun)
    ruled.defvjp(
        lambda x, w: (fun(x, w), (x, w)),
        lambda saved, g: tuple(3 * c for c in jax.vjp(fun, *saved)[1](g)),
    )
    return ruled


def custom_jvp(fun):
    ruled = jax.custom_jvp(fun)

    @ruled.defjvp
    def rule(primals, tangents):
        out, tangent = jax.jvp(fun, primals, tangents)
        return out, jax.tree.map(lambda t: 3 * t, tangent)

    return ruled


def scan(fun):
    return lambda x, w: lax.scan(lambda x, _: (fun(x, w), None), x, None, length=2)[0]


def while_loop(fun):
    return lambda x, w: lax.while_loop(lambda x: x[0, 0] > 2, lambda x: fun(x, w), x)


def cond(fun):
    return lambda x, w: lax.cond(w[0, 0] > 0, fun, lambda x, w: fun(fun(x, w), w), x, w)


# A kind of call, the products in it, and the fences: XLA inlines a call, so that the operand of
# its first product is fenced outside.
KINDS = {
    "jit": (jax.jit, 2, 2),
    "checkpoint": (jax.checkpoint, 2, 2),
    "custom_vjp": (custom_vjp, 2, 2),
    "custom_jvp": (custom_jvp, 2, 2),
    "scan": (scan, 2, 1),
    "while_loop": (while_loop, 2, 1),
    "cond": (cond, 6, 3),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def layer(x, w):
    return jnp.sin(x @ w) @ w


def problem():
    return jnp.full((64, 64), 0.5, jnp.float32), jnp.eye(64, dtype=jnp.float32)


def program(kind):
    return lambda x, w: KINDS[kind][0](layer)(jnp.cos(x), w)


def lowered(fun):
    return jax.jit(fun).lower(*problem()).as_text()


def test_every_kind_is_recognised(flags):
    assert jax_internals.unrecognised() == ()
    with jax.disable_jit():
        assert jax_internals.unrecognised() == ()


@requires_native
@each_kind
def test_fences_are_in_every_kind(kind, flags):
    assert lowered(fence(program(kind))).count("@curvax.fence") == KINDS[kind][2]


@each_kind
def test_every_product_has_the_precision(kind, flags):
    text = lowered(at_precision(program(kind), "highest"))
    products = re.findall(r"stablehlo\.dot_general.*", text)
    assert len(products) == KINDS[kind][1]
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)


@requires_native
@pytest.mark.parametrize("kind", ["jit", "checkpoint", "custom_vjp", "custom_jvp"])
def test_what_was_rewritten_keeps_its_rule(kind, flags):
    """The derivative is three times the true one where a rule says so."""
    fenced = fence(at_precision(program(kind), "highest"))
    for got, want in zip(
        jax.vjp(fenced, *problem())[1](problem()[1]),
        jax.vjp(program(kind), *problem())[1](problem()[1]),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    plain = jax.vjp(lambda x, w: layer(jnp.cos(x), w), *problem())[1](problem()[1])[1]
    own = jax.vjp(fenced, *problem())[1](problem()[1])[1]
    factor = 3 if kind.startswith("custom") else 1
    np.testing.assert_allclose(own, factor * plain, rtol=1e-6)


@each_kind
def test_what_flows_into_a_result(kind, flags):
    """The first result reads the first two arguments, the second the third."""

    def pair(xz, w):
        return xz[0] @ w, 2 * xz[1]

    def fun(x, w, z):
        call = while_pair if kind == "while_loop" else KINDS[kind][0](pair)
        return call((x, z), w)

    def while_pair(xz, w):
        return lax.while_loop(lambda xz: xz[0][0, 0] > 2, lambda xz: pair(xz, w), xz)

    x, w = problem()
    jaxpr = jax_internals.opened(jax.make_jaxpr(fun)(x, w, w))
    assert reads(jaxpr, [0]) == [True, True, False]
    # What decides on the branch, or how often the body of a loop runs, flows into all.
    decides = {"cond": [False, True, True], "while_loop": [True, True, True]}
    assert reads(jaxpr, [1]) == decides.get(kind, [False, False, True])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "while_loop"])
def test_a_custom_vjp_function_is_named_wherever_it_is(kind, flags):
    @jax.custom_vjp
    def opaque(x):
        return jnp.sin(x)

    def backward(x, g):
        return (jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), g),)

    opaque.defvjp(lambda x: (jnp.sin(x), x), backward)
    if kind.startswith("custom"):
        total = lambda x: jnp.sum(opaque(x) ** 2)  # noqa: E731
    else:
        total = lambda x: jnp.sum(KINDS[kind][0](lambda x, w: opaque(x))(x, x) ** 2)  # noqa: E731
    x = jnp.ones((2, 2), jnp.float32)

    def forward_over_reverse():
        return jax.make_jaxpr(lambda x: jax.jvp(jax.grad(total), (x,), (x,)))(x)

    with pytest.raises(TypeError, match=rf"opaque at \S*{pathlib.Path(__file__).name}:\d+ is a"):
        first_possible("the loss", total, (x,), [forward_over_reverse])


def test_the_placeholder_of_a_tangent_map_is_refused(flags):
    ruled = custom_vjp(lambda x, w: x @ w)
    x, w = problem()
    linear = jax.linearize(ruled, x, w)[1]
    with pytest.raises(TypeError, match="custom_vjp"):
        check_linear(linear, x, w)


def test_a_jaxpr_that_occurs_twice_is_lowered_once():
    inner = jax.jit(layer)

    def twice(x, w):
        return inner(inner(x, w), w)

    texts = [lowered(f) for f in (twice, at_precision(twice, "highest"), fence(twice))]
    assert [text.count("func.func private") for text in texts] == [1, 1, 1]


def test_a_closed_function_holds_constants_beside_its_program():
    """Those of a jitted function that it calls too, of which each is there once."""
    x, w = problem()
    other = jnp.ones((3, *x.shape))
    inner = jax.jit(lambda x: x @ w + other[0] + other[1])
    closed = close(lambda x: inner(inner(x)) @ w, x)
    assert sorted(const.shape for const in closed.consts) == sorted([w.shape, other.shape])
    program = closed.traced.jaxpr
    assert len(program.invars) == 3 and not program.constvars
    assert not any(list(getattr(part, "consts", ())) for eqn in program.eqns
                   for part in (program, *jax_internals.calls(eqn)))  # fmt: skip
    np.testing.assert_allclose(closed(x), inner(inner(x)) @ w, rtol=1e-5, atol=1e-5)
    halved = dataclasses.replace(closed, consts=tuple(const / 2 for const in closed.consts))
    expected = ((x @ w + 2) / 2 @ w / 2 + 1) @ w / 2
    np.testing.assert_allclose(halved(x), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def unknown_remat(monkeypatch):
    """As in a JAX that writes `jax.checkpoint` in a form of its own."""
    name = jax_internals.known.remat_p.name
    monkeypatch.setattr(jax_internals, "_CALLS", jax_internals._CALLS - {name})
    high = [kind for kind in jax_internals._HIGH_CALLS if kind != "RematTraced"]
    monkeypatch.setattr(jax_internals, "_HIGH_CALLS", tuple(high))
    jax_internals._unrecognised.cache_clear()
    yield
    jax_internals._unrecognised.cache_clear()
    jax_internals._warn_of.cache_clear()


class TestAnUnknownForm:
    @requires_native
    def test_the_fence_says_once_what_it_cannot_enter(self, unknown_remat):
        with pytest.warns(RuntimeWarning, match="writes jax.checkpoint in a form unknown"):
            fence(program("checkpoint"))
        fence(program("checkpoint"))

    def test_a_precision_is_refused(self, unknown_remat):
        with pytest.raises(NotImplementedError, match="within jax.checkpoint, which jax"):
            at_precision(program("checkpoint"), "highest")

    def test_a_function_that_cannot_be_named(self, monkeypatch):
        monkeypatch.setattr(jax_internals, "is_custom_vjp", lambda eqn: False)
        monkeypatch.setattr("curvax.operators.custom_vjp.is_custom_vjp", lambda eqn: False)
        jax_internals._unrecognised.cache_clear()
        total = lambda x: jnp.sum(custom_vjp(lambda x, w: x @ w)(x, x))  # noqa: E731
        x = jnp.ones((2, 2), jnp.float32)
        with pytest.raises(TypeError) as caught:
            first_possible("the loss", total, (x,), [lambda: jax.jvp(total, (x,), (x,))])
        assert "curvax cannot name custom_vjp functions of this JAX" in caught.value.__notes__
        jax_internals._unrecognised.cache_clear()


class TestVersions:
    @pytest.mark.parametrize("version", ["0.10.2", "0.11.2", "0.12.0.1", "0.12.1.dev20261101"])
    def test_those_that_were_tried(self, version):
        with warnings.catch_warnings(action="error"):
            jax_internals.check_version(version)

    def test_a_newer_one_warns_and_names_the_range(self):
        with pytest.warns(RuntimeWarning, match=r"tested with jax 0.10.2 to before 0.13.*0.14.1"):
            jax_internals.check_version("0.14.1")

    @pytest.mark.parametrize("public", ["eigsh", "losses"])
    def test_an_older_one_is_refused_whatever_is_asked_for_first(self, public):
        code = f"import jax, curvax; jax.__version__ = '0.9.2'; curvax.{public}"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert re.search(
            'ImportError: curvax needs jax 0.10.2 or newer, and jax 0.9.2 is there: '
            'pip install "jax>=0.10.2,<0.13"',
            ran.stderr,
        )  # fmt: skip

    def test_the_range_is_that_of_the_package(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        oldest, untried = jax_internals.TESTED
        assert f"jax>={oldest},<{untried}" in project["dependencies"]
