"""Traced programs: rewriting them and what they call, and how data flow through them."""

import abc
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var


class Rewriter(abc.ABC):
    """One rewrite. A sub-jaxpr that occurs twice stays one object, so it is lowered once."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Jaxpr, Jaxpr]] = {}

    @abc.abstractmethod
    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        """A jaxpr in place of another, of the same arguments and results."""

    @abc.abstractmethod
    def enters(self, eqn: JaxprEqn) -> bool:
        """Whether what an equation calls is rewritten too."""

    def closed(self, jaxpr: ClosedJaxpr) -> ClosedJaxpr:
        """`rewrite`, once for each jaxpr."""
        return ClosedJaxpr(self._open(jaxpr.jaxpr), jaxpr.consts)

    def params(self, eqn: JaxprEqn) -> dict[str, Any]:
        """The parameters of an equation, with what it calls rewritten."""
        if not self.enters(eqn):
            return eqn.params
        return {name: self._param(value) for name, value in eqn.params.items()}

    def _open(self, jaxpr: Jaxpr) -> Jaxpr:
        if id(jaxpr) not in self._done:
            # The original is kept beside the result, so that its id is not used again.
            self._done[id(jaxpr)] = (jaxpr, self.rewrite(jaxpr))
        return self._done[id(jaxpr)][1]

    def _param(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return self.closed(value)
        if isinstance(value, Jaxpr):
            return self._open(value)
        if isinstance(value, tuple) and any(isinstance(v, (Jaxpr, ClosedJaxpr)) for v in value):
            items = map(self._param, value)
            return value._make(items) if hasattr(value, "_make") else tuple(items)
        return value


def rewritten(fun: Callable[..., Any], make: Callable[[], Rewriter]) -> Callable[..., Any]:
    """A traceable function of pytrees whose trace is rewritten, each time by a new `make()`."""

    @functools.wraps(fun)
    def wrapped(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
        out = core.jaxpr_as_fun(make().closed(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return wrapped


# What an equation is replaced by: a jaxpr, and what its constants and arguments are.
Body = tuple[Jaxpr, Sequence[Any]]


def inlined(jaxpr: Jaxpr, body_of: Callable[[JaxprEqn, list[Any]], Body | None]) -> Jaxpr:
    """A jaxpr with some of its calls replaced by what they call.

    Args:
        jaxpr: where they are.
        body_of: what takes the place of an equation with these operands, and may have such calls
            itself; None for an equation that stays.
    """
    equations: list[JaxprEqn] = []

    def walk(jaxpr: Jaxpr, known: dict[Var, Any]) -> list[Any]:
        """Append the equations, with variables of their own, and return the results."""

        def current(atoms: Sequence[Any]) -> list[Any]:
            return [a if isinstance(a, Literal) else known.get(a, a) for a in atoms]

        for eqn in jaxpr.eqns:
            invars = current(eqn.invars)
            body = body_of(eqn, invars)
            if body is not None:
                inner, operands = body
                given = dict(zip([*inner.constvars, *inner.invars], operands, strict=True))
                outvars = walk(inner, given)
            else:
                outvars = [Var(var.aval) for var in eqn.outvars]
                equations.append(eqn.replace(invars=invars, outvars=outvars))
            known.update(zip(eqn.outvars, outvars, strict=True))
        return current(jaxpr.outvars)

    outvars = walk(jaxpr, {})
    return jaxpr.replace(eqns=equations, outvars=outvars)


def jaxpr_of_linear(linear: Callable[..., Any], *like: Any) -> Jaxpr:
    """What a linear map computes.

    Args:
        linear: the map. One that `jax.linearize` returned is a partial application of a traced
            program, which is found there: to trace it again takes as long as the product.
        like: its arguments.
    """
    given = getattr(getattr(linear, "func", None), "args", ())
    for part in given:
        if isinstance(part, (Jaxpr, ClosedJaxpr)):
            return part.jaxpr if isinstance(part, ClosedJaxpr) else part
    return jax.make_jaxpr(linear)(*like).jaxpr


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a jaxpr and of what it calls, but not of `custom_vjp` functions.

    Their operations are not those that are differentiated.
    """
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name == "custom_vjp_call":
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                if isinstance(inner, Jaxpr):
                    yield from equations(inner)


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
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        taken = [_reads_in(branch, wanted) for branch in params["branches"]]
        return [True, *map(any, zip(*taken, strict=True))]
    if name == "scan":
        consts = params["num_consts"]
        return _reads_of_loop(params["jaxpr"], consts, params["num_carry"], wanted)
    if name == "while":
        tests, consts = params["cond_nconsts"], params["body_nconsts"]
        carry = len(eqn.outvars)
        test = _reads_in(params["cond_jaxpr"], [0])
        # What decides how often the body runs flows into all that it carries.
        first = {*wanted, *(i for i in range(carry) if test[tests + i])}
        body = _reads_of_loop(params["body_jaxpr"], consts, carry, sorted(first))
        return [*test[:tests], *body]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        counts = (len(eqn.invars), len(eqn.outvars))
        if isinstance(inner, (Jaxpr, ClosedJaxpr)) and _counts(inner) == counts:
            return _reads_in(inner, wanted)
    return [True] * len(eqn.invars)


def _reads_of_loop(body: Any, consts: int, carry: int, wanted: list[int]) -> list[bool]:
    """Of the constants, the carry and, of a scan, what it walks over, until nothing is added."""
    reached = set(wanted)
    while True:
        taken = _reads_in(body, sorted(reached))
        more = {i for i in range(carry) if taken[consts + i]}
        if more <= reached:
            return [t or consts <= i < consts + carry and i - consts in reached
                    for i, t in enumerate(taken)]  # fmt: skip
        reached |= more


def _reads_in(jaxpr: Any, outputs: Iterable[int]) -> list[bool]:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return reads(inner, outputs)[len(inner.constvars) :]


def _counts(jaxpr: Any) -> tuple[int, int]:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return len(inner.invars), len(inner.outvars)
