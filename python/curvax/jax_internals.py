"""All that curvax knows of JAX beyond its documented functions: where to look with a new JAX.

Everything here may change with any release of JAX, in four ways:

- an import moves, and fails when curvax is imported;
- a primitive is renamed, or another is put in its place. Names are read from the primitives that
  `jax.extend` has; of the few that it has not, and of the settings that put other primitives in the
  place of these, `unrecognised` traces a program of each kind, and says which it cannot read;
- the parameters of an equation change: `calls`, `called`, `with_calls`, `loop` and `branches`
  alone read them, but for the precision of products and the shapes in `operators.sample_rules`;
- the class of traced programs changes: since JAX 0.11 `ClosedJaxpr` is `Jaxpr`, and a jaxpr may
  carry its constants. Test for `Jaxpr` first, and take constants out with `opened`.

`TESTED` is the range that the tests have run with: docs/compatibility.md has the record.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax.warnings import warn

# The oldest version that runs, and the first that has not been tried: the range of pyproject.toml.
TESTED = ("0.10.2", "0.13")


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what marks a build of one's own."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_version(version: str) -> None:
    """Refuse a JAX that is too old, and warn of one that is newer than those tried.

    Raises:
        ImportError: it is older than `TESTED`.
    """
    oldest, untried = TESTED
    remedy = f'pip install "jax>={oldest},<{untried}"'
    if _release(version) < _release(oldest):
        raise ImportError(
            f"curvax needs jax {oldest} or newer, and jax {version} is there: {remedy}"
        )
    if _release(version) >= _release(untried):
        warn(
            f"curvax has been tested with jax {oldest} to before {untried}, and jax {version} is "
            f"there. If something fails, {remedy}",
            RuntimeWarning,
        )


# Before the imports below, which an older JAX may not have.
check_version(jax.__version__)

from jax.extend.backend import backends  # noqa: E402
from jax.extend.core import (  # noqa: E402
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxpr_as_fun,
)
from jax.extend.core import primitives as known  # noqa: E402
from jax.interpreters import ad, batching, mlir  # noqa: E402
from jax.interpreters import partial_eval as pe  # noqa: E402

# A program by itself, or with its constants; one class from JAX 0.11 on.
AnyJaxpr: TypeAlias = Jaxpr | ClosedJaxpr
# What an equation reads.
Atom: TypeAlias = Var | Literal

__all__ = [
    "AnyJaxpr",
    "Atom",
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Var",
    "ad",
    "backends",
    "batching",
    "jaxpr_as_fun",
    "known",
    "mlir",
]


def _names(*primitives: Primitive) -> frozenset[str]:
    return frozenset(primitive.name for primitive in primitives)


PRODUCTS = _names(known.dot_general_p, known.conv_general_dilated_p)
RAGGED_PRODUCTS = frozenset({"ragged_dot_general"})
# Their jaxprs are of another machine's language.
KERNELS = frozenset({"pallas_call"})
CONTROL_FLOW = _names(known.scan_p, known.while_p, known.cond_p)
# Those that compute a result once, whatever reads it.
MOVES = _names(known.gather_p, known.scatter_p, known.scatter_add_p, known.sort_p) | {"ffi_call"}
# Those that lay an array out anew, or round it.
REARRANGEMENTS = _names(
    known.transpose_p,
    known.reshape_p,
    known.squeeze_p,
    known.broadcast_in_dim_p,
    known.slice_p,
    known.rev_p,
    known.copy_p,
    known.convert_element_type_p,
)
SUMS = _names(known.add_p, known.add_jaxvals_p)
_UNARY = """abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil clz conj
    convert_element_type copy cos cosh digamma erf erf_inv erfc exp exp2 expm1 floor imag
    integer_pow is_finite lgamma log log1p logistic name neg not population_count real
    reduce_precision round rsqrt sign sin sinh sqrt square stop_gradient tan tanh"""
_OF_SEVERAL = """add add_jaxvals and atan2 clamp complex div eq ge gt igamma igamma_grad_a igammac
    le lt max min mul ne nextafter or polygamma pow regularized_incomplete_beta rem select_n
    shift_left shift_right_arithmetic shift_right_logical sub xor zeta"""
# Of arrays of one shape, and scalars beside them, each number by itself.
ELEMENTWISE = _names(
    *(getattr(known, f"{name}_p") for name in (_UNARY + " " + _OF_SEVERAL).split())
)
# Two that `jax.extend` does not have.
SPLIT, BARRIER = "split", "optimization_barrier"
# Each runs one jaxpr on its operands, once.
_CALLS = _names(
    known.jit_p,
    known.call_p,
    known.closed_call_p,
    known.custom_jvp_call_p,
    known.custom_vjp_call_p,
    known.remat_p,
)
# With jax_custom_vjp3, jax_custom_jvp3 and jax_remat3 one primitive stands for all such functions;
# the object in its parameter `_prim` has the rules and, as a jaxpr or as a `Traced`, the program.
_HIGH_CALL = "call_hi_primitive"
_HIGH_CALLS = ("CustomVJPTraced", "CustomJVPTraced", "RematTraced")
# What the linearisation of a `custom_vjp` function leaves in place of its tangent map.
_PLACEHOLDERS = _names(known.custom_lin_p) | {"call_hi_primitive_linearized"}


def _high(eqn: JaxprEqn) -> Any | None:
    """What a call of the newer kind stands for, if its class is known."""
    if eqn.primitive.name != _HIGH_CALL:
        return None
    own = eqn.params["_prim"]
    return own if type(own).__name__ in _HIGH_CALLS else None


def calls(eqn: JaxprEqn) -> Iterator[AnyJaxpr]:
    """The jaxprs, open or closed, in the parameters of an equation."""
    own = _high(eqn)
    if own is not None:
        yield _program(own)
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                yield inner


def body(jaxpr: AnyJaxpr) -> Jaxpr:
    """The jaxpr without the constants that it may be closed with."""
    return getattr(jaxpr, "jaxpr", jaxpr)  # type: ignore[arg-type]


def _program(own: Any) -> AnyJaxpr:
    return own.jaxpr if "jaxpr" in own.params else own.traced.jaxpr


def called(eqn: JaxprEqn) -> tuple[Any, Sequence[Atom]] | None:
    """The jaxpr that a call runs once, and the operand of each of its inputs; None of no call.

    Calls of `jit`, `jax.checkpoint`, `custom_jvp` and `custom_vjp`: XLA inlines them all.
    """
    own = _high(eqn)
    if own is not None:
        return _program(own), eqn.invars
    if eqn.primitive.name not in _CALLS:
        return None
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), eqn.invars


def with_calls(eqn: JaxprEqn, rewrite: Callable[[AnyJaxpr], AnyJaxpr]) -> dict[str, Any]:
    """The parameters of an equation with `rewrite` of each jaxpr in place of it."""
    own = _high(eqn)
    if own is not None:
        return {**eqn.params, "_prim": _high_with(own, rewrite)}

    def param(value: object) -> object:
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            return rewrite(value)
        if isinstance(value, tuple) and any(isinstance(v, (Jaxpr, ClosedJaxpr)) for v in value):
            items = map(param, value)
            return value._make(items) if hasattr(value, "_make") else tuple(items)
        return value

    return {name: param(value) for name, value in eqn.params.items()}


def _high_with(own: Any, rewrite: Callable[[AnyJaxpr], AnyJaxpr]) -> Any:
    """The same rules around another program."""
    if "jaxpr" in own.params:
        changed: dict[str, Any] = {"jaxpr": rewrite(own.jaxpr)}
    else:
        traced = copy.copy(own.traced)
        traced._params = {**traced._params, "jaxpr": rewrite(traced.jaxpr)}
        changed = {"traced": traced}
    made = copy.copy(own)
    made.params = {**own.params, **changed}
    made.__dict__.update(changed)
    return made


def is_placeholder(eqn: JaxprEqn) -> bool:
    """Whether it can be transposed, not evaluated: the tangent map of a `custom_vjp` function."""
    return eqn.primitive.name in _PLACEHOLDERS


def is_custom_vjp(eqn: JaxprEqn) -> bool:
    """Whether it calls a `custom_vjp` function, whose operations are not what is differentiated."""
    return eqn.primitive is known.custom_vjp_call_p or (
        type(_high(eqn)).__name__ == "CustomVJPTraced"
    )


def has_rule(eqn: JaxprEqn) -> bool:
    """Whether it calls a function with a rule of differentiation of its own."""
    return (
        eqn.primitive in (known.custom_jvp_call_p, known.custom_vjp_call_p)
        or type(_high(eqn)).__name__ in _HIGH_CALLS[:2]
    )


def jitted(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program of a call of `jit`, with what it closes over; None of another equation."""
    return eqn.params["jaxpr"] if eqn.primitive is known.jit_p else None


def is_dot(eqn: JaxprEqn) -> bool:
    """Whether it is a product of matrices, and no convolution."""
    return eqn.primitive is known.dot_general_p


def is_broadcast(eqn: JaxprEqn) -> bool:
    """Whether it repeats one array, of which all shapes are known."""
    return eqn.primitive is known.broadcast_in_dim_p and len(eqn.invars) == 1


def is_update(eqn: JaxprEqn) -> bool:
    """Whether it puts an array into another, its first operand."""
    return eqn.primitive is known.dynamic_update_slice_p


def transposed(eqn: JaxprEqn) -> tuple[int, ...] | None:
    """The order in which a transposition takes the axes; None of another equation."""
    return eqn.params["permutation"] if eqn.primitive is known.transpose_p else None


Axes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def convolution_axes(eqn: JaxprEqn) -> Axes | None:
    """Of each operand and of the result of a convolution, the places of its axes.

    Batch and features, or features out and in, and then those of space.
    """
    if eqn.primitive is not known.conv_general_dilated_p:
        return None
    lhs, rhs, out = eqn.params["dimension_numbers"]
    return tuple(lhs), tuple(rhs), tuple(out)


def with_convolution_axes(eqn: JaxprEqn, axes: Axes) -> dict[str, Any]:
    """The parameters of a convolution with its axes in other places."""
    return {**eqn.params, "dimension_numbers": jax.lax.ConvDimensionNumbers(*axes)}


def source_of(eqn: JaxprEqn) -> str:
    """The function that a call is of, as "name at file:line"."""
    (inner, _) = called(eqn) or (None, None)
    return body(inner).debug_info.func_src_info or "a function"  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A scan or a while loop: its operands are constants, what it carries, and what it walks over.

    Attributes:
        body: from the constants, the carry and one element each of the rest to the next carry.
        consts: number of the body's constants.
        carry: number of arrays carried.
        test: of a while loop: from constants of its own, which are the first operands, and the
            carry to whether the body runs again.
        test_consts: number of those constants.
        length: of a scan: how often the body runs.
        reverse: of a scan: whether it begins with the last of what it walks over.
    """

    body: AnyJaxpr
    consts: int
    carry: int
    test: AnyJaxpr | None = None
    test_consts: int = 0
    length: int = 0
    reverse: bool = False


def loop(eqn: JaxprEqn) -> Loop | None:
    """What a scan or a while loop repeats; None of another equation."""
    params = eqn.params
    if eqn.primitive is known.scan_p:
        if "num_carry" in params:  # before JAX 0.11
            consts, carry = params["num_consts"], params["num_carry"]
        else:
            consts, carry, _ = (len(list(part)) for part in params["ft_in"].unpack())
        length, reverse = params["length"], params["reverse"]
        return Loop(params["jaxpr"], consts, carry, length=length, reverse=reverse)
    if eqn.primitive is known.while_p:
        tests, consts = params["cond_nconsts"], params["body_nconsts"]
        carry = len(eqn.outvars)
        return Loop(params["body_jaxpr"], consts, carry, params["cond_jaxpr"], tests)
    return None


def branches(eqn: JaxprEqn) -> Sequence[AnyJaxpr]:
    """The jaxprs of a `cond`, each of all operands but the first; none of another equation."""
    return eqn.params["branches"] if eqn.primitive is known.cond_p else ()


def parts(value: Any) -> dict[str, object] | None:
    """What decides what one of JAX's own objects in the parameters of an equation means.

    The trees by which loops name the structure of what they carry, whose class is not public
    (since JAX 0.11; what they remember of themselves is left out), and `jax.checkpoint` as
    jax_remat3 writes it. None of another value.
    """
    kind = type(value)
    if kind.__module__ == "jax._src.flattree":
        return {name: part for name, part in vars(value).items() if name not in ("paths", "vals")}
    if kind.__module__.startswith("jax._src.") and kind.__name__ == "RematTraced":
        return dict(value.params)
    return None


def opened(closed: ClosedJaxpr) -> Jaxpr:
    """The jaxpr whose first arguments are the constants, which it does not hold."""
    jaxpr = closed.jaxpr
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def live(closed: ClosedJaxpr) -> Jaxpr:
    """As `opened`, without what no result is computed from."""
    jaxpr = opened(closed)
    return pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


# Programs of each kind that has to be recognised, of one product.


def _product(x: jax.Array) -> jax.Array:
    return x @ x


_custom_vjp = jax.custom_vjp(_product)
_custom_vjp.defvjp(lambda x: (x, None), lambda _, g: (g,))
_custom_jvp = jax.custom_jvp(_product)
_custom_jvp.defjvp(lambda primals, tangents: (primals[0], tangents[0]))

_KINDS: dict[str, Callable[[jax.Array], object]] = {
    "jit": jax.jit(_product),
    "jax.checkpoint": jax.checkpoint(_product),
    "custom_vjp": _custom_vjp,
    "a tangent of custom_vjp": lambda x: jax.jvp(_custom_vjp, (x,), (x,))[1],
    "custom_jvp": _custom_jvp,
    "scan": lambda x: jax.lax.scan(lambda c, _: (_product(c), None), x, None, length=2)[0],
    "while_loop": lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, _product, x),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, _product, lambda x: x, x),
    "ragged_dot": lambda x: jax.lax.ragged_dot(x, x[None], jnp.ones(1, jnp.int32)),
    "ffi_call": lambda x: jax.ffi.ffi_call("curvax.fence", jax.typeof(x))(x),
}

# JAX traces it anew when a setting changes that its traces depend on.
_probe = jax.jit(lambda x: [fun(x) for fun in _KINDS.values()])


def unrecognised() -> tuple[str, ...]:
    """What of `jit`, `scan` and their like JAX writes, as it is set, in a form unknown here."""
    with jax.disable_jit(False):
        return _unrecognised(_probe.trace(jax.ShapeDtypeStruct((2, 2), jnp.float32)).jaxpr)


def warn_unrecognised() -> None:
    """Warn, once for each set of kinds, of `unrecognised` ones, whose products will be slower."""
    if kinds := unrecognised():
        _warn_of(kinds)


@functools.cache
def _warn_of(kinds: tuple[str, ...]) -> None:
    warn(
        f"jax {jax.__version__} writes {', '.join(kinds)} in a form unknown to curvax, by its "
        "version or a setting such as jax_scan3: products are right, and may be slow where XLA "
        "computes their operands again",
        RuntimeWarning,
    )


@functools.lru_cache(maxsize=8)
def _unrecognised(traced: Any) -> tuple[str, ...]:
    jaxpr = traced.jaxpr
    producer = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    found = zip(_KINDS, jaxpr.outvars, strict=True)
    return tuple(kind for kind, var in found if not _recognised(kind, producer.get(var)))


def _recognised(kind: str, eqn: JaxprEqn | None) -> bool:
    if eqn is None:
        return False
    if kind == "ragged_dot":
        return eqn.primitive.name in RAGGED_PRODUCTS
    if kind == "ffi_call":
        return eqn.primitive.name in MOVES
    if kind == "a tangent of custom_vjp":
        return is_placeholder(eqn)
    known_kind = called(eqn) is not None or eqn.primitive.name in CONTROL_FLOW
    inside = (e.primitive.name for inner in calls(eqn) for e in body(inner).eqns)
    if kind == "scan":
        known_kind = known_kind and getattr(loop(eqn), "carry", None) == 1
    if kind == "custom_vjp":
        known_kind = known_kind and is_custom_vjp(eqn)
    return known_kind and not PRODUCTS.isdisjoint(inside)
