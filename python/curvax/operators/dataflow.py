"""Which inputs of a traced program an output is computed from: data flow, not derivatives."""

from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


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
