"""Equal keys for what computes the same, and for nothing else."""

from __future__ import annotations

import collections
import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import jaxpr_keys
from curvax.jaxpr_keys import key_of, key_of_program

X = np.ones(3, np.float32)


def key(fun, *args):
    """Of a function that is traced anew: JAX would return its trace of the same one."""
    closed = jax.make_jaxpr(lambda *own: fun(*own))(*(args or (X,)))
    return key_of_program(closed.jaxpr), closed


def scanned(x, step):
    return jax.lax.scan(lambda c, y: (c * step + y, c), x, jnp.ones((2, 3)))


def called(callback):
    return lambda x: jax.pure_callback(callback, jax.ShapeDtypeStruct((3,), np.float32), x)


@jax.jit
def doubled(x):
    return 2 * x


def tripled(x):
    return 3 * np.asarray(x)


SAME = {
    "arithmetic": lambda x: jnp.sin(x) * 2 + x[1],
    "literals": lambda x: x * np.float32(1.5) + 3,
    "loop": lambda x: scanned(x, 2.0),
    "branch": lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
    "while": lambda x: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: c + 1, x),
    "jit": lambda x: doubled(doubled(x)),
    "checkpoint": lambda x: jax.checkpoint(jnp.sin)(x),
    "random": lambda x: x + jax.random.normal(jax.random.key(3), (3,)),
    "gather and sort": lambda x: jnp.sort(x)[jnp.array([0, 2])] + jnp.cumsum(x)[0],
    "convolution": lambda x: jnp.convolve(x, x),
    "callback": called(tripled),
    "second derivative": jax.hessian(lambda x: jnp.sum(jax.nn.silu(x) ** 3)),
}


@pytest.mark.parametrize("name", SAME)
def test_a_function_that_is_traced_again_has_the_same_key(name):
    one, first = key(SAME[name])
    two, second = key(SAME[name])
    assert first.jaxpr is not second.jaxpr and one is two


def relu_with(rule):
    @jax.custom_jvp
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defjvp(lambda primals, tangents: (relu(*primals), rule(*tangents)))
    return relu


def square_with(factor):
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (factor * x * g,))
    return square


DIFFERENT = {
    "a constant": (lambda x: x * 2, lambda x: x * 3),
    "the sign of zero": (lambda x: x + 0.0, lambda x: x + -0.0),
    "the dtype of a constant": (lambda x: np.float32(2), lambda x: np.int32(2)),
    "a weak type": (lambda x: jnp.asarray(2.0), lambda x: jnp.float32(2)),
    "an integer power": (lambda x: x**2, lambda x: x**3),
    "an operation": (jnp.sin, jnp.cos),
    "an order of operands": (lambda x: x - x[0], lambda x: x[0] - x),
    "what is returned": (lambda x: (x + 1, x), lambda x: (x, x + 1)),
    "an axis": (lambda x: jnp.sum(x[None], 0), lambda x: jnp.sum(x[:, None], 1)),
    "a precision": (
        lambda x: jnp.matmul(x, x, precision="highest"),
        lambda x: jnp.matmul(x, x, precision="default"),
    ),
    "a step of a loop": (lambda x: scanned(x, 2.0), lambda x: scanned(x, 3.0)),
    "the direction of a loop": (
        lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x),
        lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x, reverse=True),
    ),
    "a branch": (
        lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.lax.cond(x[0] > 0, jnp.cos, jnp.sin, x),
    ),
    "a seed": (lambda x: jax.random.key_data(jax.random.key(1)),
               lambda x: jax.random.key_data(jax.random.key(2))),
    "a generator": (
        lambda x: jax.random.key_data(jax.random.key(1, impl="threefry2x32")),
        lambda x: jax.random.key_data(jax.random.key(1, impl="rbg"))[:2],
    ),
    "a callback": (called(lambda x: x), called(lambda x: x)),
    "a rule for forward mode": (relu_with(lambda t: t), relu_with(lambda t: 2 * t)),
    "a rule for reverse mode": (square_with(2), square_with(3)),
    "a constant of a jitted function": (
        jax.jit(lambda x: x * np.full(3, 2, np.float32)),
        jax.jit(lambda x: x * np.full(3, 5, np.float32)),
    ),
    "a name of an axis": (
        lambda x: jax.vmap(lambda y: jax.lax.psum(y, "i"), axis_name="i")(x),
        lambda x: jax.vmap(lambda y: jax.lax.pmax(y, "i"), axis_name="i")(x),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_in_little_has_another_key(name):
    (one, first), (two, second) = map(key, DIFFERENT[name])
    assert one is not two, (first, second)


def test_the_types_of_arguments_count():
    kinds = [np.ones(3, np.float32), np.ones(4, np.float32), np.ones(3, np.int32), 1.0]
    found = [key(lambda x: x + x, kind) for kind in kinds]
    assert len({one for one, _ in found}) == len(kinds)


def test_the_context_of_an_equation_counts():
    def drawn(x):
        return jax.random.bits(jax.random.wrap_key_data(np.zeros(2, np.uint32)), (3,))

    with jax.threefry_partitionable(True):
        one, first = key(drawn)
    with jax.threefry_partitionable(False):
        two, second = key(drawn)
    assert one is not two, (first, second)


def test_the_values_of_constants_do_not_count_but_their_types_do():
    one, first = key(lambda x: x * jnp.full(3, 2.0))
    found = [key(lambda x, c=c: x * c) for c in (jnp.arange(3.0), jnp.ones(3), jnp.ones(1))]
    assert found[0][0] is found[1][0] is not found[2][0]


Pair = collections.namedtuple("Pair", "a b")
Other = collections.namedtuple("Other", "a b")


@dataclasses.dataclass(frozen=True)
class Record:
    value: object


@dataclasses.dataclass(frozen=True)
class Alike:
    value: object


@dataclasses.dataclass
class Changing:
    value: object


class Text(str):
    """With more than its characters."""


def test_of_parameters():
    same = [
        (1, 1), (1.5, 1.5), (float("nan"), float("nan")), ((1, "a"), (1, "a")), (Pair(1, 2),) * 2,
        ({"a": 1}, {"a": 1}), ({1, 2}, {2, 1}), (np.arange(3), np.arange(3)), (np.dtype("f4"),) * 2,
        (Record((1, 2)), Record((1, 2))), (np.float32(2), np.float32(2)), (None, None),
        (jax.tree.structure({"a": (1, None)}), jax.tree.structure({"a": (2, None)})),
    ]  # fmt: skip
    for one, two in same:
        assert key_of(one) is key_of(two)
    changing = Changing(1)
    assert key_of(changing) is key_of(changing)
    different = [
        1, True, 1.0, np.int32(1), np.int64(1), "1", b"1", None, (1,), [1], {1}, frozenset({1}),
        0.0, -0.0, 0, False, Pair(1, 2), Other(1, 2), (1, 2), Record(1), Record(1.0), Alike(1),
        Changing(1), Changing(1), object(), object(), len, Text("1"), Text("1"), {"a": 1},
        np.arange(3), np.arange(3.0), np.arange(3)[:, None], jnp.ones(3), jnp.ones(3),
        jax.tree.structure((1, 2)), jax.tree.structure([1, 2]), jax.tree.structure((1, None)),
    ]  # fmt: skip
    keys = [key_of(value) for value in different]
    assert len(set(keys)) == len(keys)


def test_a_record_with_more_in_it_than_its_fields_is_known_by_identity():
    one, two = Record(1), Record(1)
    object.__setattr__(one, "hidden", 2)
    assert key_of(one) is key_of(one) is not key_of(two)


def test_keys_go_with_what_they_are_of():
    gc.collect()
    before = len(jaxpr_keys._keys)
    kept = [key(SAME[name]) for name in ("arithmetic", "loop")]
    assert len(jaxpr_keys._keys) > before
    del kept
    gc.collect()
    assert len(jaxpr_keys._keys) == before
