"""Activation functions whose residuals are their derivatives: one array for each order.

JAX differentiates `gelu(x)` operation by operation. The linear half of a Hessian then reads the
factor of each, ten arrays as large as x, where two suffice: with f the whole function,

    d f(x) = f'(x) dx,        d (f'(x) c) = f'(x) dc + (f''(x) dx) c.

So what a loss computes number by number from one array is made one function, with a rule of
differentiation, wherever the residuals are fewer then. They are JAX's own derivatives, of the same
operations, evaluated once.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.jax_internals import (
    ELEMENTWISE,
    KERNELS,
    REARRANGEMENTS,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Primitive,
    Var,
    ad,
    batching,
    body,
    has_rule,
    is_update,
    jaxpr_as_fun,
    jitted,
    mlir,
)
from curvax.jaxpr_keys import Key, Keyed, key_of_program
from curvax.jaxprs import Body, Rewriter, inlined, reads, rewritten
from curvax.operators.closure import Closed, Traced
from curvax.typing import PyTree

# Of one array, to arrays like it.
Function = Callable[[Array], tuple[Array, ...]]


def with_whole_activations(fun: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A traceable function that is to be differentiated, with activation functions made whole."""
    return rewritten(fun, _Activations)


class _Activations(Rewriter):
    def enters(self, eqn: JaxprEqn) -> bool:
        # What has a rule of its own is not differentiated.
        return eqn.primitive.name not in KERNELS and not has_rule(eqn)

    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        jaxpr = inlined(jaxpr, _elementwise_call)
        whole = [part for part in _parts(jaxpr) if part.pays]
        replaced = {var for part in whole for var in part.exits}
        inside = {i for part in whole for i in part.members}
        at = {part.members[0]: part for part in whole}
        # Backwards, to leave out what nothing reads any longer.
        live = {var for var in jaxpr.outvars if isinstance(var, Var)}
        eqns: list[JaxprEqn] = []
        for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
            var = eqn.outvars[0] if eqn.outvars else None
            if i not in inside or (var in live and var not in replaced):
                eqns.append(eqn.replace(params=self.params(eqn)))
                live.update(atom for atom in eqn.invars if isinstance(atom, Var))
            if i in at:
                eqns.append(at[i].equation())
        return jaxpr.replace(eqns=eqns[::-1])


def _elementwise_call(eqn: JaxprEqn, operands: list[Any]) -> Body | None:
    """What a function that JAX has jitted computes, if it is nothing but elementwise."""
    inner = jitted(eqn)
    return (body(inner), operands) if inner is not None and _is_elementwise(eqn) else None


def _is_elementwise(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name in ELEMENTWISE or _spreads_a_number(eqn):
        return len(eqn.outvars) == 1
    # Only into `jit`: a rule of differentiation may be anything, whatever the function is.
    inner = jitted(eqn)
    if inner is None or inner.consts or len(eqn.outvars) != 1:
        return False
    return all(map(_is_elementwise, body(inner).eqns))


def _spreads_a_number(eqn: JaxprEqn) -> bool:
    shapes: list[Any] = [atom.aval for atom in eqn.invars]
    return eqn.primitive.name in REARRANGEMENTS and all(aval.shape == () for aval in shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class _Function(Keyed):
    """A program of one array, to arrays like it."""

    jaxpr: Jaxpr

    @functools.cached_property
    def key(self) -> Key:
        """See `Keyed`."""
        return key_of_program(self.jaxpr)

    def __call__(self, x: Array) -> tuple[Array, ...]:
        return tuple(jaxpr_as_fun(ClosedJaxpr(self.jaxpr, []))(x))

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """The type of the array, and of each result."""
        return _like(self.jaxpr.invars[0])


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is computed from one array number by number.

    Attributes:
        source: the array.
        members: the places of the equations.
        exits: those of the results that other equations read, and that are curved.
        function: from the source to the exits.
    """

    source: Var
    members: list[int]
    exits: list[Var]
    function: _Function

    @property
    def pays(self) -> bool:
        """Whether residuals are fewer if it is one function."""
        return bool(self.exits) and _pays(self.function)

    def equation(self) -> JaxprEqn:
        """It as one function."""
        (eqn,) = jax.make_jaxpr(_whole(self.function))(self.function.like).jaxpr.eqns
        return eqn.replace(invars=[self.source], outvars=self.exits)


def _parts(jaxpr: Jaxpr) -> Iterator[_Part]:
    source: dict[Var, Var] = {}
    constants: dict[Var, JaxprEqn] = {}
    members: dict[Var, list[int]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.effects or not _is_elementwise(eqn):
            continue
        read = [atom for atom in eqn.invars if isinstance(atom, Var) and atom not in constants]
        sources = {source.get(var, var) for var in read}
        if not sources:
            constants[eqn.outvars[0]] = eqn
        elif len(sources) == 1 and _may_be_source(own := sources.pop(), eqn.outvars[0]):
            source[eqn.outvars[0]] = own
            members.setdefault(own, []).append(i)
    for own, places in members.items():
        made = [jaxpr.eqns[i] for i in places]
        program = jaxpr.replace(
            constvars=[], invars=[own], eqns=[*constants.values(), *made], outvars=[]
        )
        exits = [v for v in _read_outside(jaxpr, places) if _same_type(v, own)]
        exits = [v for v in exits if _is_curved(_Function(program.replace(outvars=[v])))]
        yield _Part(own, places, exits, _Function(program.replace(outvars=exits)))


def _may_be_source(source: Var, result: Var) -> bool:
    """Not numbers, which cost nothing; nor 16 bits, in which products of factors are rounded."""
    of, to = source.aval, result.aval
    return of.dtype in (np.float32, np.float64) and of.shape == to.shape != ()  # type: ignore[attr-defined]


def _same_type(a: Var, b: Var) -> bool:
    return a.aval.dtype == b.aval.dtype  # type: ignore[attr-defined]


def _read_outside(jaxpr: Jaxpr, places: list[int]) -> list[Var]:
    """What equations at these places make, and others read."""
    inside = set(places)
    others = (eqn.invars for i, eqn in enumerate(jaxpr.eqns) if i not in inside)
    atoms = itertools.chain(jaxpr.outvars, *others)
    read = {atom for atom in atoms if isinstance(atom, Var)}
    return [var for i in places if (var := jaxpr.eqns[i].outvars[0]) in read]


@functools.lru_cache(maxsize=256)
def _is_curved(function: _Function) -> bool:
    """Whether the second derivative is more than one number for all."""
    second = jax.make_jaxpr(_derivative(_derivative(function)))(function.like)
    return reads(second.jaxpr, [0])[-1]


@functools.lru_cache(maxsize=256)
def _pays(function: _Function) -> bool:
    arguments = function.like, len(function.jaxpr.outvars)
    whole, parts = (_residual_bytes(f, *arguments) for f in (_whole(function), function))
    return whole < parts


def _residual_bytes(function: Function, like: jax.ShapeDtypeStruct, results: int) -> int:
    """What the linear half of the second derivatives reads, beside its arguments."""

    def gradient(x: Array, cotangents: tuple[Array, ...]) -> PyTree:
        out, pull = jax.vjp(function, x)
        return out, pull(cotangents)

    def residuals(*args: PyTree) -> list[Array]:
        return jax.tree.leaves(jax.linearize(gradient, *args)[1])

    jaxpr = jax.make_jaxpr(residuals)(like, (like,) * results).jaxpr
    kept = {var for var in jaxpr.outvars if isinstance(var, Var)} - {*jaxpr.invars}
    avals: list[Any] = [var.aval for var in kept]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)


def _derivative(function: Function) -> Function:
    return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


def _derivatives(x: Array, *, function: _Function, order: int) -> list[Array]:
    """The function and its derivatives up to an order, one after the other."""
    orders: list[Function] = [function]
    for _ in range(order):
        orders.append(_derivative(orders[-1]))
    return [value for fun in orders for value in fun(x)]


# Not a `custom_jvp` function: in a scan JAX forgets their rules when it first splits the body.
_WHOLE = Primitive("curvax_activation")
_WHOLE.multiple_results = True


def _whole(function: _Function, order: int = 0) -> Function:
    return lambda x: tuple(_WHOLE.bind(x, function=function, order=order))


def _rule(primals: PyTree, tangents: PyTree, *, function: _Function, order: int) -> PyTree:
    (x,), (dx,) = primals, tangents
    values = _WHOLE.bind(x, function=function, order=order + 1)
    count = len(function.jaxpr.outvars)
    return values[:-count], [value * dx for value in values[count:]]


def _batched(args: PyTree, axes: PyTree, *, function: _Function, order: int) -> PyTree:
    (x,), (axis,) = args, axes
    x = jnp.moveaxis(x, axis, 0)
    of_all = _Function(jax.make_jaxpr(jax.vmap(function))(x).jaxpr)
    values = _WHOLE.bind(x, function=of_all, order=order)
    return values, [0] * len(values)


def _register() -> None:
    _WHOLE.def_impl(jax.jit(_derivatives, static_argnames=("function", "order")))
    _WHOLE.def_abstract_eval(
        lambda x, *, function, order: [x] * len(function.jaxpr.outvars) * (order + 1)
    )
    mlir.register_lowering(_WHOLE, mlir.lower_fun(_derivatives, multiple_results=True))
    ad.primitive_jvps[_WHOLE] = _rule
    batching.primitive_batchers[_WHOLE] = _batched


_register()


def opened(program: Closed) -> Closed:
    """A program that is differentiated, with the operations of activation functions in it."""
    traced = program.traced
    return Closed(program.consts, Traced(_Opened()(traced.jaxpr), traced.out_tree))


class _Opened(Rewriter):
    def enters(self, eqn: JaxprEqn) -> bool:
        return eqn.primitive.name not in KERNELS

    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        if any(eqn.primitive is _WHOLE for eqn in jaxpr.eqns):
            jaxpr = inlined(jaxpr, _operations)
        eqns = [eqn.replace(params=self.params(eqn)) for eqn in _with_updates_apart(jaxpr)]
        return jaxpr.replace(eqns=eqns)


def _with_updates_apart(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The equations, with what is updated in part, and read elsewhere, made before the update.

    XLA:CPU fuses the operations that make it, the update, and what reads both, and then updates in
    place what is still to be read: `y + y.at[1:3].set(y[:2])` was off by 20 % (jaxlib 0.10.2).
    """
    atoms = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
    readers = collections.Counter(atom for atom in atoms if isinstance(atom, Var))
    operands = (eqn.invars[0] for eqn in jaxpr.eqns if is_update(eqn))
    updated = {atom for atom in operands if isinstance(atom, Var)}
    for eqn in jaxpr.eqns:
        apart = [var for var in eqn.outvars if var in updated and readers[var] > 1]
        made = {var: Var(var.aval) for var in apart}
        yield eqn.replace(outvars=[made.get(var, var) for var in eqn.outvars])
        for var in apart:
            (barrier,) = jax.make_jaxpr(jax.lax.optimization_barrier)(_like(var)).jaxpr.eqns
            yield barrier.replace(invars=[made[var]], outvars=[var])


def _like(var: Var) -> jax.ShapeDtypeStruct:
    aval: Any = var.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _operations(eqn: JaxprEqn, operands: list[Any]) -> Body | None:
    if eqn.primitive is not _WHOLE:
        return None
    function = eqn.params["function"]
    return _program(function, eqn.params["order"]), operands


@functools.lru_cache(maxsize=256)
def _program(function: _Function, order: int) -> Jaxpr:
    derivatives = functools.partial(_derivatives, function=function, order=order)
    return jax.make_jaxpr(derivatives)(function.like).jaxpr
