"""A traced program restricted to one sample, where the samples of a batch do not mix in it.

Every value of the program is either the same for all samples or has them along one axis, in order.
The restricted program computes of the latter the part of one sample. It is the whole program's: the
function is not traced on a smaller batch, where it may divide by another length, draw another mask
or take another branch. What cannot be followed is refused.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax

from curvax.jax_internals import (
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
    live,
    loop,
)
from curvax.jaxprs import Body, inlined
from curvax.operators.closure import Closed
from curvax.operators.sample_rules import MixedError, Sample, UnfollowedError, Value, apply


@dataclasses.dataclass(frozen=True)
class OneByOneProgram:
    """A traced program, to be evaluated on one sample after the other.

    Attributes:
        jaxpr: what it computes, without calls.
        known: what is the same for all samples, and computed once; the inputs among it.
    """

    jaxpr: Jaxpr
    known: dict[Var, Value]

    @classmethod
    def of(cls, program: Closed, shared: Sequence[Array | None]) -> "OneByOneProgram":
        """The program, given the arguments, as leaves, that all samples share; None of the rest."""
        jaxpr = inlined(live(ClosedJaxpr(program.traced.jaxpr, [])), _call)
        given = zip(jaxpr.invars, (*program.consts, *shared), strict=True)
        known = {var: Value(array) for var, array in given if array is not None}
        for eqn in jaxpr.eqns:
            same = all(isinstance(atom, Literal) or atom in known for atom in eqn.invars)
            if same and called(eqn) is None:
                operands = [_read(known, atom) for atom in eqn.invars]
                known.update(zip(eqn.outvars, _whole(eqn, operands), strict=True))
        return cls(jaxpr, known)

    def __call__(self, sample: Sample, own: Sequence[Value]) -> list[Value]:
        """The results.

        Args:
            sample: the sample.
            own: its parts of the arguments that are not shared, in order.

        Raises:
            MixedError: samples mix; the message names the primitive.
            UnfollowedError: they may; the message names the primitive.
        """
        rest = [var for var in self.jaxpr.invars if var not in self.known]
        return _evaluate(sample, self.jaxpr, {**self.known, **dict(zip(rest, own, strict=True))})


def evaluated(sample: Sample, program: Closed, values: Sequence[Value]) -> list[Value]:
    """The results of a program on values that are known for this sample only; see there."""
    jaxpr = live(ClosedJaxpr(program.traced.jaxpr, []))
    given = [*map(Value, program.consts), *values]
    return _evaluate(sample, jaxpr, dict(zip(jaxpr.invars, given, strict=True)))


def _call(eqn: JaxprEqn, operands: list[Any]) -> Body | None:
    call = called(eqn)
    if call is None or getattr(call[0], "consts", None):
        return None
    return body(call[0]), operands


def _read(values: dict[Var, Value], atom: Atom) -> Value:
    return Value(atom.val) if isinstance(atom, Literal) else values[atom]


def _run(sample: Sample, program: Any, operands: Sequence[Value]) -> list[Value]:
    """The results of a jaxpr, open or closed, that a loop or a branch runs."""
    inner = body(program)
    consts = [Value(const) for const in getattr(program, "consts", ())]
    variables = [*inner.constvars, *inner.invars]
    return _evaluate(sample, inner, dict(zip(variables, [*consts, *operands], strict=True)))


def _evaluate(sample: Sample, jaxpr: Jaxpr, values: dict[Var, Value]) -> list[Value]:
    for eqn in jaxpr.eqns:
        if all(var in values for var in eqn.outvars):  # what all samples share
            continue
        operands = [_read(values, atom) for atom in eqn.invars]
        values.update(zip(eqn.outvars, _equation(sample, eqn, operands), strict=True))
    return [_read(values, atom) for atom in jaxpr.outvars]


def _equation(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    call = called(eqn)
    if call is not None:
        return _run(sample, call[0], operands)
    if all(value.axis is None for value in operands):
        return _whole(eqn, operands)
    try:
        return _followed(sample, eqn, operands)
    except (MixedError, UnfollowedError) as error:
        raise type(error)(*(error.args or (eqn.primitive.name,))) from None
    except KeyError:  # an equation that another JAX describes by other parameters
        raise UnfollowedError(eqn.primitive.name) from None


def _whole(eqn: JaxprEqn, operands: Sequence[Value]) -> list[Value]:
    """What an equation computes that all samples share."""
    out = eqn.primitive.bind(*_arrays(operands), **eqn.params)
    return [Value(array) for array in (out if eqn.primitive.multiple_results else [out])]


def _followed(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    if eqn.effects:
        raise UnfollowedError
    repeated = loop(eqn)
    if repeated is not None and repeated.test is None:
        return _scan(sample, repeated, operands)
    if repeated is not None:
        return _while_loop(sample, repeated, operands)
    if choices := branches(eqn):
        return _cond(sample, choices, operands)
    return apply(sample, eqn, operands)


def _arrays(values: Sequence[Value]) -> list[Any]:
    return [value.array for value in values]


def _axes(values: Sequence[Value]) -> list[int | None]:
    return [value.axis for value in values]


def _with(arrays: Sequence[Any], axes: Sequence[int | None]) -> list[Value]:
    return [Value(array, axis) for array, axis in zip(arrays, axes, strict=True)]


def _cut(sample: Sample, values: Sequence[Value], axes: Sequence[int | None]) -> list[Value]:
    """The values with the samples along these axes, where there are any."""
    pairs = zip(values, axes, strict=True)
    return [value if axis is None else sample.part(value, axis) for value, axis in pairs]


def _join(first: Sequence[int | None], second: Sequence[int | None]) -> list[int | None]:
    """Axes for values that are known by the one or by the other."""
    return [a if b is None else b for a, b in zip(first, second, strict=True)]


def _traced_axes(function: Any, *arrays: Any) -> list[int | None]:
    """The axes of the values that a function of arrays returns."""
    found: list[int | None] = []

    def run(*arrays: Any) -> list[Any]:
        values = function(*arrays)
        found[:] = _axes(values)
        return _arrays(values)

    jax.eval_shape(run, *arrays)
    return found


def _scan(sample: Sample, own: Loop, operands: list[Value]) -> list[Value]:
    consts = operands[: own.consts]
    carry = operands[own.consts : own.consts + own.carry]
    walked = operands[own.consts + own.carry :]
    if any(value.axis == 0 for value in walked):
        raise UnfollowedError
    inner = [None if value.axis is None else value.axis - 1 for value in walked]

    def step(carry: Sequence[Any], entry: Sequence[Any], axes: list[int | None]) -> list[Value]:
        results = _run(sample, own.body, [*consts, *_with(carry, axes), *_with(entry, inner)])
        joined = _join(axes, _axes(results[: own.carry]))
        return [*_cut(sample, results[: own.carry], joined), *results[own.carry :]]

    axes, found = _axes(carry), []
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in _arrays(walked)]
    while True:
        carry = _cut(sample, carry, axes)
        found = _traced_axes(lambda c, x, axes=axes: step(c, x, axes), _arrays(carry), first)
        if found[: own.carry] == axes:
            break
        axes = found[: own.carry]

    def one(carry: list[Any], entry: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _arrays(step(carry, entry, axes))
        return results[: own.carry], results[own.carry :]

    last, stacked = lax.scan(one, _arrays(carry), _arrays(walked), own.length, reverse=own.reverse)
    outer = [None if axis is None else axis + 1 for axis in found[own.carry :]]
    return [*_with(last, axes), *_with(stacked, outer)]


def _while_loop(sample: Sample, own: Loop, operands: list[Value]) -> list[Value]:
    tests = operands[: own.test_consts]
    consts = operands[own.test_consts : own.test_consts + own.consts]
    carry = operands[own.test_consts + own.consts :]

    def step(carry: Sequence[Any], axes: list[int | None]) -> list[Value]:
        results = _run(sample, own.body, [*consts, *_with(carry, axes)])
        return _cut(sample, results, _join(axes, _axes(results)))

    axes = _axes(carry)
    while True:
        carry = _cut(sample, carry, axes)
        found = _traced_axes(lambda c, axes=axes: step(c, axes), _arrays(carry))
        if found == axes:
            break
        axes = found

    def again(carry: list[Any]) -> Any:
        # A scalar, and so the same for all samples.
        return _run(sample, own.test, [*tests, *_with(carry, axes)])[0].array

    last = lax.while_loop(again, lambda carry: _arrays(step(carry, axes)), _arrays(carry))
    return _with(last, axes)


def _cond(sample: Sample, choices: Sequence[Any], operands: list[Value]) -> list[Value]:
    """The first operand is a scalar, and so the same for all samples."""
    index, *rest = operands
    of = _axes(rest)

    def branch(program: Any, *arrays: Any) -> list[Value]:
        return _run(sample, program, _with(arrays, of))

    axes: list[int | None] | None = None
    for program in choices:
        found = _traced_axes(lambda *a, p=program: branch(p, *a), *_arrays(rest))
        axes = found if axes is None else _join(axes, found)
    assert axes is not None

    def run(program: Any, arrays: Sequence[Any]) -> list[Any]:
        return _arrays(_cut(sample, branch(program, *arrays), axes))

    functions = [lambda *a, p=program: run(p, a) for program in choices]
    return _with(lax.switch(index.array, functions, *_arrays(rest)), axes)
