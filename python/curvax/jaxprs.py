"""Traced programs: rewriting them and what they call, and how data flow through them."""

import abc
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax

from curvax.jax_internals import (
    AnyJaxpr,
    Atom,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Loop,
    Var,
    body,
    branches,
    called,
    calls,
    is_custom_vjp,
    jaxpr_as_fun,
    loop,
    with_calls,
)
from curvax.typing import PyTree


class Rewriter(abc.ABC):
    """One rewrite. A sub-jaxpr that occurs twice stays one object, so it is lowered once."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[AnyJaxpr, AnyJaxpr]] = {}

    @abc.abstractmethod
    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        """A jaxpr in place of another, of the same arguments and results."""

    @abc.abstractmethod
    def enters(self, eqn: JaxprEqn) -> bool:
        """Whether what an equation calls is rewritten too."""

    def __call__(self, jaxpr: AnyJaxpr) -> Any:
        """`rewrite` of a jaxpr, open or closed, once for each."""
        if id(jaxpr) not in self._done:
            if isinstance(jaxpr, Jaxpr):
                new: AnyJaxpr = self.rewrite(jaxpr)
            else:
                new = jaxpr.replace(jaxpr=self(jaxpr.jaxpr))
            # The original is kept beside the result, so that its id is not used again.
            self._done[id(jaxpr)] = (jaxpr, new)
        return self._done[id(jaxpr)][1]

    def params(self, eqn: JaxprEqn) -> dict[str, Any]:
        """The parameters of an equation, with what it calls rewritten."""
        return with_calls(eqn, self) if self.enters(eqn) else eqn.params


def rewritten(fun: Callable[..., PyTree], make: Callable[[], Rewriter]) -> Callable[..., PyTree]:
    """A traceable function of pytrees whose trace is rewritten, each time by a new `make()`."""

    @functools.wraps(fun)
    def wrapped(*args: object) -> PyTree:
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
        out = jaxpr_as_fun(make()(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return wrapped


# What an equation is replaced by: a jaxpr without constants, and what its arguments are.
Body = tuple[Jaxpr, Sequence[Atom]]


def inlined(jaxpr: Jaxpr, body_of: Callable[[JaxprEqn, list[Atom]], Body | None]) -> Jaxpr:
    """A jaxpr with some of its calls replaced by what they call.

    Args:
        jaxpr: where they are.
        body_of: what takes the place of an equation with these operands, and may have such calls
            itself; None for an equation that stays.
    """
    equations: list[JaxprEqn] = []

    def walk(jaxpr: Jaxpr, known: dict[Var, Atom]) -> list[Any]:
        """Append the equations, with variables of their own, and return the results."""

        def current(atoms: Sequence[Atom]) -> list[Atom]:
            return [a if isinstance(a, Literal) else known.get(a, a) for a in atoms]

        for eqn in jaxpr.eqns:
            invars = current(eqn.invars)
            replacement = body_of(eqn, invars)
            if replacement is not None:
                inner, operands = replacement
                outvars = walk(inner, dict(zip(inner.invars, operands, strict=True)))
            else:
                outvars = [Var(var.aval) for var in eqn.outvars]
                equations.append(eqn.replace(invars=invars, outvars=outvars))
            known.update(zip(eqn.outvars, outvars, strict=True))
        return current(jaxpr.outvars)

    outvars = walk(jaxpr, {})
    return jaxpr.replace(eqns=equations, outvars=outvars)


def jaxpr_of_linear(linear: Callable[..., PyTree], *like: PyTree) -> Jaxpr:
    """What a linear map computes.

    Args:
        linear: the map. One that `jax.linearize` returned is a partial application of a traced
            program, which is found there: to trace it again takes as long as the product.
        like: its arguments.
    """
    for part in getattr(getattr(linear, "func", None), "args", ()):
        if isinstance(part, (Jaxpr, ClosedJaxpr)):
            return body(part)
    return jax.make_jaxpr(linear)(*like).jaxpr


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a jaxpr and of what it calls, but not of `custom_vjp` functions.

    Their operations are not those that are differentiated.
    """
    for eqn in jaxpr.eqns:
        yield eqn
        if not is_custom_vjp(eqn):
            for inner in calls(eqn):
                yield from equations(body(inner))


def origins(jaxpr: Jaxpr) -> Callable[[Var], Hashable]:
    """What tells results apart: equal for variables that hold the same numbers for certain.

    A scan returns a stack once for each use of it, and passes on what it walks over; JAX makes two
    arrays then.
    """
    producers = {var: (eqn, i) for eqn in jaxpr.eqns for i, var in enumerate(eqn.outvars)}

    def origin(var: Var) -> Hashable:
        eqn, i = producers.get(var, (None, 0))
        repeated = loop(eqn) if eqn is not None else None
        # What is carried is not what the last step returns of it alone, nor of the same shape.
        if eqn is None or repeated is None or repeated.test is not None or i < repeated.carry:
            return var
        inner = body(repeated.body)
        step = inner.outvars[i]
        walked = dict(zip(inner.invars, eqn.invars, strict=False))
        constant = repeated.consts + repeated.carry
        if isinstance(step, Literal) or step in inner.invars[:constant]:
            return var
        source = walked.get(step)
        return (id(eqn), step) if source is None else _of(source)

    def _of(atom: Atom) -> Hashable:
        return origin(atom) if isinstance(atom, Var) else id(atom)

    return origin


def reads(jaxpr: Jaxpr, outputs: Iterable[int]) -> list[bool]:
    """Whether each input, constants first, flows into any of the outputs at these positions."""
    live = {jaxpr.outvars[i] for i in outputs if not isinstance(jaxpr.outvars[i], Literal)}
    for eqn in reversed(jaxpr.eqns):
        wanted = [i for i, var in enumerate(eqn.outvars) if var in live]
        if wanted:
            read = zip(eqn.invars, _reads_of(eqn, wanted), strict=True)
            live |= {var for var, taken in read if taken and not isinstance(var, Literal)}
    return [var in live for var in (*jaxpr.constvars, *jaxpr.invars)]


def _reads_of(eqn: JaxprEqn, wanted: list[int]) -> Sequence[bool]:
    """Which operands flow into the results of an equation at the positions `wanted`."""
    if choices := branches(eqn):
        taken = [_reads_in(branch, wanted) for branch in choices]
        return [True, *map(any, zip(*taken, strict=True))]
    if repeated := loop(eqn):
        tests, first = [], set(wanted)
        if repeated.test is not None:
            test = _reads_in(repeated.test, [0])
            tests = test[: repeated.test_consts]
            # What decides how often the body runs flows into all that it carries.
            first |= {i for i, taken in enumerate(test[repeated.test_consts :]) if taken}
        return [*tests, *_reads_of_loop(repeated, first)]
    inner, operands = called(eqn) or (eqn.params.get("jaxpr"), eqn.invars)
    if inner is None or _counts(inner) != (len(operands), len(eqn.outvars)):
        return [True] * len(eqn.invars)
    read = zip(operands, _reads_in(inner, wanted), strict=True)
    flowing = {id(operand) for operand, taken in read if taken}
    return [id(operand) in flowing for operand in eqn.invars]


def _reads_of_loop(repeated: Loop, reached: set[int]) -> list[bool]:
    """Of the constants, the carry and, of a scan, what it walks over, until nothing is added."""
    consts, carry = repeated.consts, repeated.carry
    while True:
        taken = _reads_in(repeated.body, sorted(reached))
        more = {i for i in range(carry) if taken[consts + i]}
        if more <= reached:
            return [t or consts <= i < consts + carry and i - consts in reached
                    for i, t in enumerate(taken)]  # fmt: skip
        reached = reached | more


def _reads_in(jaxpr: AnyJaxpr, outputs: Iterable[int]) -> list[bool]:
    inner = body(jaxpr)
    return reads(inner, outputs)[len(inner.constvars) :]


def _counts(jaxpr: AnyJaxpr) -> tuple[int, int]:
    inner = body(jaxpr)
    return len(inner.invars), len(inner.outvars)
