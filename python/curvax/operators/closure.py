"""Tracing a function once, with the arrays it closes over turned into arguments.

An array that a jitted function closes over is compiled in as a constant: XLA folds it, holds a
second copy, and needs several times as long to compile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from curvax.arrays import to_array
from curvax.jax_internals import ClosedJaxpr, Jaxpr, jaxpr_as_fun, opened


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
class Hoisted:
    """A traced function `(consts, *args) -> result`; hashed by identity, so usable as static.

    Attributes:
        jaxpr: of the arrays that the function closed over, and the leaves of the arguments.
        closed_over: how many arrays those are.
        out_tree: the structure of the result.
    """

    jaxpr: Jaxpr
    closed_over: int
    out_tree: Any

    def __reduce__(self) -> Any:
        refuse_pickling()

    def __deepcopy__(self, memo: Any) -> "Hoisted":
        return self

    def __call__(self, consts: tuple[Any, ...], *args: Any) -> Any:
        """Evaluate on the arguments it was traced for."""
        out = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, []))(*consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(self.out_tree, out)


def hoist(fun: Callable[..., Any], *args: Any) -> tuple[Hoisted, tuple[Any, ...]]:
    """Trace `fun` on the shapes and dtypes of `args`; return it and the arrays it closed over."""
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    consts = tuple(
        to_array(const, "an array that the function closes over", var.aval.dtype)
        for const, var in zip(closed.consts, closed.jaxpr.constvars, strict=True)
    )
    return Hoisted(opened(closed), len(consts), jax.tree.structure(shapes)), consts
