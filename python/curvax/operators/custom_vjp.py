"""What stands in the way of a second derivative: functions with a `custom_vjp` rule.

Such a function refuses forward mode. Where its backward pass can itself be differentiated, another
order of differentiation gives the same; where it cannot, its name is what the user needs to know.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from curvax.jax_internals import (
    ClosedJaxpr,
    Jaxpr,
    is_custom_vjp,
    is_placeholder,
    jaxpr_as_fun,
    live,
    source_of,
    unrecognised,
)
from curvax.jaxprs import equations, jaxpr_of_linear
from curvax.typing import PyTree

Result = TypeVar("Result")


def first_possible(
    what: str,
    fun: Callable[..., PyTree],
    args: Sequence[object],
    ways: Sequence[Callable[[], Result]],
) -> Result:
    """The result of the first of `ways` that JAX can trace.

    Args:
        what: what is differentiated, for messages.
        fun: the same, traceable on `args`.
        args: its arguments.
        ways: of differentiating it twice.

    Raises:
        TypeError: none is possible, and `fun` calls functions with a `custom_vjp` rule.
        Exception: what the first way raises, if `fun` calls none or cannot itself be traced.
    """
    first: Exception | None = None
    for way in ways:
        try:
            return way()
        except Exception as error:
            if first is None:
                first, names = error, _custom_vjp_functions(fun, args)
                if not names:
                    if "custom_vjp" in unrecognised():
                        error.add_note("curvax cannot name custom_vjp functions of this JAX")
                    raise
    plural = "are jax.custom_vjp functions" if len(names) > 1 else "is a jax.custom_vjp function"
    raise TypeError(
        f"{what} cannot be differentiated twice: {', '.join(names)} {plural}, so forward mode is "
        "refused, and the backward pass cannot be differentiated either. Replace by plain JAX "
        "operations (for attention: eager, or implementation='xla'), by a jax.custom_jvp rule, or, "
        "for a loss, by one of curvax.losses; or take hessian(..., method='finite_difference'). "
        f"JAX says: {first}"
    ) from first


def check_linear(linear: Callable[..., PyTree], *like: PyTree) -> None:
    """Refuse a linear map that JAX can transpose but not evaluate.

    Raises:
        TypeError: it holds the tangent map of a `custom_vjp` function, which is a placeholder.
    """
    _check(jaxpr_of_linear(linear, *like))


def checked_linear(linear: Callable[[PyTree], PyTree], tangents: PyTree) -> PyTree:
    """`linear(tangents)`, for which it is traced once.

    Raises:
        TypeError: as `check_linear`, of what the result is computed from. With jax_custom_vjp3
            JAX 0.11 says so no sooner than the whole is compiled, of what it is not too.
    """
    closed, shapes = jax.make_jaxpr(linear, return_shape=True)(tangents)
    jaxpr = live(closed)
    _check(jaxpr)
    out = jaxpr_as_fun(ClosedJaxpr(jaxpr, []))(*closed.consts, *jax.tree.leaves(tangents))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _check(jaxpr: Jaxpr) -> None:
    if any(map(is_placeholder, equations(jaxpr))):
        raise TypeError("can't apply forward-mode differentiation (jvp) to a custom_vjp function.")


def pull_back(pull: Callable[[PyTree], PyTree], cotangents: PyTree) -> PyTree:
    """The result of a `jax.vjp` of a function of one argument."""
    return pull(cotangents)[0]


def _custom_vjp_functions(fun: Callable[..., PyTree], args: Sequence[object]) -> list[str]:
    """Name and place of each such function that `fun` calls; none if it cannot be traced."""
    try:
        jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    except Exception:
        return []
    return sorted({source_of(eqn) for eqn in equations(jaxpr) if is_custom_vjp(eqn)})
