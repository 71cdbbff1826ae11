"""Which traced programs compute the same: a key of a jaxpr by what is in it, not by which it is.

Two jaxprs have equal keys if they bind the same primitives to the same variables with the same
parameters, on arguments of the same types. Places in the source do not count, nor the values of
the arrays that a program takes as constants: they are arguments. A parameter of a type that is not
known here is compared by identity, and so are functions: a callback, or a rule of differentiation.
Programs may then be told apart that compute the same, but none is taken for another.
"""

import abc
import dataclasses
import enum
import types
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from curvax.jax_internals import (
    AnyJaxpr,
    Atom,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    body,
    parts,
)


class Key:
    """Stands for what was given to `key_of`: the same object for equal things while one is kept."""

    __slots__ = ("__weakref__",)


class Keyed(abc.ABC):
    """What is compared by a key, and so may be static in compiled programs."""

    @property
    @abc.abstractmethod
    def key(self) -> Key:
        """What it is compared by."""

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and self.key is other.key)

    def __hash__(self) -> int:
        return hash(self.key)


_keys: weakref.WeakValueDictionary[Hashable, Key] = weakref.WeakValueDictionary()


def key_of(value: object) -> Key:
    """The key of what may be a parameter in a jaxpr: a jaxpr too, with its constants."""
    return _shared(_content(value, {}))


def key_of_program(jaxpr: Jaxpr) -> Key:
    """The key of a jaxpr whose own constants are arguments."""
    return _shared(_equations(jaxpr, {}))


def _shared(content: Hashable) -> Key:
    return _keys.setdefault(content, Key())


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """An object by identity, which is kept so that no other takes its place in memory."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


# Of one value per state, whatever the object, and compared by it.
_PLAIN = (bool, int, str, bytes, type(None))
# JAX keeps its own programs apart by comparing these.
_OF_JAX = (
    jax.core.AbstractValue,
    jax.sharding.AbstractMesh,
    jax.sharding.Mesh,
    jax.sharding.PartitionSpec,
    jax.sharding.Sharding,
)

Seen = dict[int, tuple[Jaxpr, Key]]


def _content(value: Any, seen: Seen) -> Hashable:
    """`value` as something hashable, equal for equal values alone.

    Args:
        value: what may be a parameter of an equation.
        seen: the jaxprs that have a key, by their ids; they are kept beside it.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind in (float, complex):
        return kind, np.asarray(value).tobytes()  # 0.0 == -0.0, and nan != nan
    if isinstance(value, (int, float, complex)) and isinstance(_dtype(value), np.dtype):
        return kind, _dtype(value), np.asarray(value, _dtype(value)).tobytes()
    if isinstance(value, (np.ndarray, np.generic)):
        return _of_array(value)
    if isinstance(value, (ClosedJaxpr, Jaxpr)):
        return _of_jaxpr(value, seen)
    if isinstance(value, (tuple, list, frozenset, set)) and not getattr(value, "__dict__", None):
        items = [_content(item, seen) for item in value]
        return _Same(kind), tuple(items) if isinstance(value, (tuple, list)) else frozenset(items)
    if kind is dict:
        return kind, tuple((_content(k, seen), _content(v, seen)) for k, v in value.items())
    if isinstance(value, enum.Enum):
        return _Same(value)
    if isinstance(value, (np.dtype, *_OF_JAX)):
        return kind, value
    if isinstance(value, PyTreeDef):
        children = tuple(_content(child, seen) for child in value.children())
        return kind, _content(value.node_data(), seen), children
    if isinstance(value, types.MethodType):
        return kind, _Same(value.__func__), _Same(value.__self__)
    if (inner := parts(value)) is not None:
        return _Same(kind), _content(inner, seen)
    if _is_record(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return _Same(kind), tuple(_content(field, seen) for field in fields)
    return _Same(value)


def _dtype(value: object) -> Any:
    """Of an array, or of a number of JAX's that is one of Python with a dtype."""
    return getattr(value, "dtype", None)


def _is_record(value: object) -> bool:
    """Whether a value is of a frozen dataclass, with nothing in it but the fields."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    params: Any = type(value).__dataclass_params__  # type: ignore[attr-defined]
    held = set(getattr(value, "__dict__", ()))
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        held |= {slots} if isinstance(slots, str) else set(slots)
    fields = {field.name for field in dataclasses.fields(value)}
    return bool(params.frozen) and held <= {*fields, "__weakref__"}


def _of_array(array: np.ndarray | np.generic) -> Hashable:
    # JAX's own arrays on the host have a type beside that of NumPy, and may be of a weak one.
    aval = getattr(array, "aval", None)
    known = isinstance(array, np.generic) or type(array) is np.ndarray or aval is not None
    if array.dtype.hasobject or not known:
        return _Same(array)
    return type(array), aval, array.dtype, array.shape, array.tobytes()


def _of_jaxpr(jaxpr: AnyJaxpr, seen: Seen) -> Hashable:
    """With its constants: by identity, but for those of NumPy, which may change."""
    program = body(jaxpr)
    if id(program) not in seen:
        seen[id(program)] = (program, _shared(_equations(program, seen)))
    # From JAX 0.11 on there is one class of both, and an open one may have constants too.
    consts = [_content(const, seen) for const in getattr(jaxpr, "consts", ())]
    return Jaxpr, seen[id(program)][1], tuple(consts)


def _equations(jaxpr: Jaxpr, seen: Seen) -> Hashable:
    number: dict[Var, int] = {}

    def read(atom: Atom) -> Hashable:
        if isinstance(atom, Literal):
            aval: Any = atom.aval  # type: ignore[attr-defined]
            return type(aval), aval, _content(atom.val, seen)
        return number[atom]

    def write(variables: Sequence[Var]) -> Hashable:
        for var in variables:
            number[var] = len(number)
        return tuple((type(var.aval), var.aval) for var in variables)

    def equation(eqn: JaxprEqn) -> Hashable:
        params = tuple((name, _content(value, seen)) for name, value in eqn.params.items())
        read_from = tuple(map(read, eqn.invars))
        # The context, as of `jax.threefry_partitionable`, is one object for each state.
        about = (_Same(eqn.primitive), params, eqn.ctx, frozenset(eqn.effects))
        return about, read_from, write(eqn.outvars)

    own: Any = jaxpr
    head = write(jaxpr.constvars), write(jaxpr.invars), frozenset(jaxpr.effects), own.is_high
    body = tuple(equation(eqn) for eqn in jaxpr.eqns)
    return head, body, tuple(map(read, jaxpr.outvars))
