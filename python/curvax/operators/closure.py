"""Tracing a function once, with the arrays it closes over turned into arguments.

An array that a jitted function closes over is compiled in as a constant: XLA folds it, holds a
second copy, and needs several times as long to compile.

What was traced is static in compiled programs, and compared by what it computes: a function that is
traced anew, as for the next operator of the same loss, finds the programs of the one before.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from curvax.arrays import to_array
from curvax.jaxpr_keys import Key, Keyed, key_of, key_of_program
from curvax.jaxprs import Body, Rewriter, equations, inlined
from curvax.program import Argument

_WITH_RULES = ("custom_jvp_call", "custom_vjp_call")


def refuse_pickling() -> NoReturn:
    """Say what to do in place of pickling a traced function.

    Raises:
        TypeError: always.
    """
    raise TypeError(
        "an operator cannot be pickled, nor sent to another process: it holds traced functions. "
        "Make it there anew, from the same loss, parameters and batches; a result is kept by "
        "result.save(path) and read by curvax.load(path)"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Traced(Keyed):
    """A traced function of flat arguments, constants first, and the structure of its result.

    Two are equal if they compute the same; see `curvax.jaxpr_keys`.
    """

    jaxpr: Jaxpr
    out_tree: Any

    def __reduce__(self) -> Any:
        refuse_pickling()

    def __deepcopy__(self, memo: Any) -> "Traced":
        return self

    @functools.cached_property
    def key(self) -> Key:
        """See `Keyed`."""
        return key_of((key_of_program(self.jaxpr), self.out_tree))

    @functools.cached_property
    def without_rules(self) -> "Traced":
        """The same values, without rules of differentiation, which are compared by identity."""
        if not any(eqn.primitive.name in _WITH_RULES for eqn in equations(self.jaxpr)):
            return self
        return Traced(_WithoutRules().rewrite(self.jaxpr), self.out_tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Closed(Argument):
    """A traced function, with the arrays that it closes over as its data."""

    consts: tuple[Any, ...]
    traced: Traced = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: Any) -> Any:
        """Evaluate on the arguments it was traced for."""
        closed = ClosedJaxpr(self.traced.jaxpr, list(self.consts))
        out = core.jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(self.traced.out_tree, out)

    def as_argument(self) -> "Closed":
        """See `Argument`: what is run is not differentiated again."""
        return Closed(self.consts, self.traced.without_rules)

    def returning(self, out_tree: Any) -> "Closed":
        """The same, with its results in another structure."""
        return Closed(self.consts, Traced(self.traced.jaxpr, out_tree))


def close(fun: Callable[..., Any], *args: Any) -> Closed:
    """Trace `fun` on the shapes and dtypes of `args`."""

    # A function of its own: JAX would return an earlier trace of the same one, with arrays that it
    # closed over then.
    def fresh(*args: Any) -> Any:
        return fun(*args)

    closed, shapes = jax.make_jaxpr(fresh, return_shape=True)(*args)
    jaxpr, values = _lifted(closed)
    avals: list[Any] = [var.aval for var in jaxpr.constvars]
    consts = tuple(
        to_array(const, "an array that the function closes over", aval.dtype)
        for const, aval in zip(values, avals, strict=True)
    )
    return Closed(consts, Traced(jaxpr, jax.tree.structure(shapes)))


def _lifted(closed: ClosedJaxpr) -> tuple[Jaxpr, list[Any]]:
    """A program and its constants, those of the jitted functions that it calls among them."""
    jaxpr, consts = closed.jaxpr, list(closed.consts)
    # Effects may name arguments by their places, which would be others.
    if jaxpr.effects or not any(_has_consts(eqn) for eqn in jaxpr.eqns):
        return jaxpr, consts
    variables = list(jaxpr.constvars)
    place = {id(const): var for const, var in zip(consts, variables, strict=True)}

    def body_of(eqn: JaxprEqn, operands: list[Any]) -> Body | None:
        if not _has_consts(eqn):
            return None
        inner = eqn.params["jaxpr"]
        for const, var in zip(inner.consts, inner.jaxpr.constvars, strict=True):
            if id(const) not in place:
                place[id(const)] = Var(var.aval)
                variables.append(place[id(const)])
                consts.append(const)
        return inner.jaxpr, [*(place[id(const)] for const in inner.consts), *operands]

    lifted = inlined(jaxpr, body_of)
    return lifted.replace(constvars=variables), consts


def _has_consts(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name != "jit":
        return False
    inner = eqn.params["jaxpr"]
    return bool(inner.consts) or any(_has_consts(e) for e in inner.jaxpr.eqns)


class _WithoutRules(Rewriter):
    """Replaces functions with a rule of differentiation by what they compute."""

    def enters(self, eqn: JaxprEqn) -> bool:
        # A kernel's program is in a language of its own.
        return eqn.primitive.name != "pallas_call"

    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        if any(_body_with_rule(eqn, []) for eqn in jaxpr.eqns):
            jaxpr = inlined(jaxpr, _body_with_rule)
        return jaxpr.replace(eqns=[eqn.replace(params=self.params(eqn)) for eqn in jaxpr.eqns])


def _body_with_rule(eqn: JaxprEqn, operands: Sequence[Any]) -> Body | None:
    if eqn.primitive.name not in _WITH_RULES:
        return None
    inner = eqn.params["call_jaxpr"]
    return None if inner.consts else (inner.jaxpr, operands)
