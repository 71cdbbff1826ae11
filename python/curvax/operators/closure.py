"""Tracing a function once, with the arrays it closes over turned into arguments.

An array that a jitted function closes over is compiled in as a constant: XLA folds it, holds a
second copy, and needs several times as long to compile.

What was traced is static in compiled programs, and compared by what it computes: a function that is
traced anew, as for the next operator of the same loss, finds the programs of the one before.
"""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax import Array

from curvax.arrays import to_array
from curvax.jax_internals import (
    KERNELS,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Var,
    body,
    called,
    has_rule,
    jaxpr_as_fun,
    jitted,
    opened,
)
from curvax.jaxpr_keys import Key, Keyed, key_of, key_of_program
from curvax.jaxprs import Body, Rewriter, equations, inlined
from curvax.program import Argument
from curvax.typing import PyTree, PyTreeDef


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
    """A traced function of flat arguments, what it closed over first, and how its result looks.

    Two are equal if they compute the same; see `curvax.jaxpr_keys`.
    """

    jaxpr: Jaxpr
    out_tree: PyTreeDef

    def __reduce__(self) -> NoReturn:
        refuse_pickling()

    def __deepcopy__(self, memo: object) -> "Traced":
        return self

    @functools.cached_property
    def key(self) -> Key:
        """See `Keyed`."""
        return key_of((key_of_program(self.jaxpr), self.out_tree))

    @functools.cached_property
    def without_rules(self) -> "Traced":
        """The same values, without rules of differentiation, which are compared by identity."""
        ruled = any(map(has_rule, equations(self.jaxpr)))
        program = Traced(_WithoutRules().rewrite(self.jaxpr), self.out_tree) if ruled else self
        hash(program)  # the key is made beside the compilation: the next operator asks for it
        return program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Closed(Argument):
    """A traced function, with the arrays that it closes over as its data."""

    consts: tuple[Array, ...]
    traced: Traced = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: object) -> PyTree:
        """Evaluate on the arguments it was traced for."""
        run = jaxpr_as_fun(ClosedJaxpr(self.traced.jaxpr, []))
        out = run(*self.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(self.traced.out_tree, out)

    def as_argument(self) -> "Closed":
        """See `Argument`: what is run is not differentiated again."""
        return Closed(self.consts, self.traced.without_rules)


def close(fun: Callable[..., PyTree], *args: object) -> Closed:
    """Trace `fun` on the shapes and dtypes of `args`."""

    # A function of its own: JAX would return an earlier trace of the same one, with arrays that it
    # closed over then.
    def fresh(*args: object) -> PyTree:
        return fun(*args)

    with _collector_paused():
        closed, shapes = jax.make_jaxpr(fresh, return_shape=True)(*args)
    jaxpr, values = _lifted(closed)
    avals: list[PyTree] = [var.aval for var in jaxpr.invars[: len(values)]]
    consts = tuple(
        to_array(value, "an array that the function closes over", aval.dtype)
        for value, aval in zip(values, avals, strict=True)
    )
    return Closed(consts, Traced(jaxpr, jax.tree.structure(shapes)))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A trace makes many objects that stay: a third of its time would go into walks over them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _lifted(closed: ClosedJaxpr) -> tuple[Jaxpr, list[PyTree]]:
    """A program whose first arguments are its constants, and those, of which it holds none.

    The constants of jitted functions that it calls are among them.
    """
    jaxpr, consts = opened(closed), list(closed.consts)
    # Effects may name arguments by their places, which would be others.
    if jaxpr.effects or not any(map(_has_consts, jaxpr.eqns)):
        return jaxpr, consts
    own = len(consts)
    variables = jaxpr.invars[:own]
    place = {id(const): var for const, var in zip(consts, variables, strict=True)}

    def body_of(eqn: JaxprEqn, operands: list[PyTree]) -> Body | None:
        if not _has_consts(eqn):
            return None
        inner: Any = jitted(eqn)
        program = opened(inner)
        for const, var in zip(inner.consts, program.invars, strict=False):
            if id(const) not in place:
                place[id(const)] = Var(var.aval)
                variables.append(place[id(const)])
                consts.append(const)
        return program, [*(place[id(const)] for const in inner.consts), *operands]

    lifted = inlined(jaxpr, body_of)
    return lifted.replace(invars=[*variables, *jaxpr.invars[own:]]), consts


def _has_consts(eqn: JaxprEqn) -> bool:
    inner = jitted(eqn)
    return inner is not None and (bool(inner.consts) or any(map(_has_consts, body(inner).eqns)))


class _WithoutRules(Rewriter):
    """Replaces functions with a rule of differentiation by what they compute."""

    def enters(self, eqn: JaxprEqn) -> bool:
        # A kernel's program is in a language of its own.
        return eqn.primitive.name not in KERNELS

    def rewrite(self, jaxpr: Jaxpr) -> Jaxpr:
        if any(map(has_rule, jaxpr.eqns)):
            jaxpr = inlined(jaxpr, _without_rule)
        return jaxpr.replace(eqns=[eqn.replace(params=self.params(eqn)) for eqn in jaxpr.eqns])


def _without_rule(eqn: JaxprEqn, operands: list[PyTree]) -> Body | None:
    call = called(eqn) if has_rule(eqn) else None
    closed_over: Any = getattr(call[0], "consts", None) if call else None
    return (body(call[0]), operands) if call and not closed_over else None
