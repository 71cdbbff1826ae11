"""Rewriting of traced programs, and of what they call."""

import abc
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


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
