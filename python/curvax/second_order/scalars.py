"""Scalar functions whose value, gradient and Hessian products are computed by code of their own.

A function of several arrays, its *slots*, becomes differentiable twice in every mode: value,
gradient and Hessian product are primitives, each the derivative of the one before. The last is
linear in its tangents and, since a Hessian is symmetric, its own transpose. Tangents have a leading
block axis, into which `vmap` over tangents folds, so that what depends on the slots alone is
computed once for a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.sharding import PartitionSpec

from curvax.jax_internals import Primitive, ad, batching
from curvax.ops.manual_axes import equally_varying
from curvax.second_order import rules
from curvax.second_order.rules import Flags, T
from curvax.typing import PyTree


class _Params(TypedDict):
    """Of an equation with a Hessian product."""

    spec: Hashable
    constants: int
    given: Flags
    wanted: Flags


@dataclasses.dataclass(frozen=True)
class ScalarLoss:
    """How to compute a scalar function of slots, given data that are not differentiated.

    Attributes:
        name: for messages, and of the primitive.
        value: `(spec, slots, data) -> scalar`.
        gradient: `(spec, slots, data) -> (scalar, one array per slot)`.
        products: `(spec, slots, data, tangents, wanted) -> one array per slot that is wanted`;
            `tangents` has an array `(b, *slot)`, or None for zero, per slot, and so has the result.
    """

    name: str
    value: Callable[..., Array]
    gradient: Callable[..., tuple[Array, tuple[Array, ...]]]
    products: Callable[..., tuple[Array, ...]]


class TwiceDifferentiable:
    """A `ScalarLoss` with the rules that JAX's transformations need."""

    def __init__(self, loss: ScalarLoss) -> None:
        self._name = loss.name

        def value(*args: Array, spec: Hashable, slots: int) -> list[Array]:
            return [loss.value(spec, args[:slots], args[slots:])]

        def gradient(*args: Array, spec: Hashable, slots: int) -> list[Array]:
            total, parts = loss.gradient(spec, args[:slots], args[slots:])
            return [total, *parts]

        def product(
            *args: Array, spec: Hashable, constants: int, given: Flags, wanted: Flags
        ) -> Sequence[Array]:
            slots, data, tangents = _split(args, constants, given)
            return loss.products(spec, slots, data, rules.filled(tangents, given), wanted)

        self._value = rules.primitive(loss.name, value, _value_type, ("spec", "slots"))
        self._gradient = rules.primitive(
            f"{loss.name}_gradient", gradient, _gradient_types, ("spec", "slots")
        )
        self._product = rules.primitive(
            f"{loss.name}_hessian_product",
            product,
            _product_types,
            ("spec", "constants", "given", "wanted"),
        )
        ad.primitive_jvps[self._value] = self._value_rule
        ad.primitive_jvps[self._gradient] = self._gradient_rule
        ad.primitive_jvps[self._product] = functools.partial(_jvp_rule, loss.name, self._product)
        rule = functools.partial(_transpose_rule, self._product)
        ad.primitive_transposes[self._product] = rule
        for primitive in (self._value, self._gradient):
            batching.primitive_batchers[primitive] = functools.partial(rules.one_by_one, primitive)
        batched = functools.partial(_product_batching_rule, self._product)
        batching.primitive_batchers[self._product] = batched

    def __call__(self, spec: Hashable, slots: Sequence[Array], data: Sequence[Array]) -> Array:
        """The value.

        Args:
            spec: static options, passed on.
            slots: what may be differentiated.
            data: what may not: labels, weights; the last of them has the dtype of the value.
        """
        slots, data = equally_varying(slots, data)
        return self._value.bind(*slots, *data, spec=spec, slots=len(slots))[0]

    def hessian_product(
        self,
        spec: Hashable,
        slots: Sequence[Array],
        data: Sequence[Array],
        tangents: Sequence[Array | None],
    ) -> tuple[Array, ...]:
        """The Hessian times one vector: `tangents` has an array, or None for zero, per slot."""
        present, given = rules.there(tangents)
        slots, data, there = equally_varying(slots, data, present)
        if not there:
            return tuple(jnp.zeros_like(slot) for slot in slots)
        out = self._product.bind(
            *slots,
            *data,
            *(t[None] for t in there),
            spec=spec,
            constants=len(data),
            given=given,
            wanted=(True,) * len(slots),
        )
        return tuple(block[0] for block in out)

    def _value_rule(
        self, primals: PyTree, tangents: PyTree, spec: Hashable, slots: int
    ) -> tuple[list[Array], list[Array]]:
        present = self._present(tangents, slots)
        value, *gradient = self._gradient.bind(*primals, spec=spec, slots=slots)
        return [value], [_directional(value, gradient, present)]

    def _gradient_rule(
        self, primals: PyTree, tangents: PyTree, spec: Hashable, slots: int
    ) -> tuple[list[Array], list[Array]]:
        present = self._present(tangents, slots)
        value, *gradient = self._gradient.bind(*primals, spec=spec, slots=slots)
        products = self.hessian_product(spec, primals[:slots], primals[slots:], present)
        return [value, *gradient], [_directional(value, gradient, present), *products]

    def _present(self, tangents: Sequence[PyTree], slots: int) -> list[Array | None]:
        _check_data(self._name, tangents[slots:])
        return rules.nonzero(tangents[:slots])


def _check_data(name: str, tangents: Sequence[PyTree]) -> None:
    """Refuse a derivative in the data; integers have tangents too, of a dtype of their own."""
    if not all(rules.is_zero(t) or t.dtype == jax.dtypes.float0 for t in tangents):
        raise TypeError(
            f"{name} is not differentiable in its labels and weights: wrap what depends on the "
            "parameters in jax.lax.stop_gradient"
        )


def _directional(
    value: Array, gradient: Sequence[Array], tangents: Sequence[Array | None]
) -> Array:
    total = jnp.zeros_like(value)
    for g, t in zip(gradient, tangents, strict=True):
        if t is not None:
            # Row by row: of a sum over all elements, linearisation would keep the cotangent spread
            # to the size of the slot.
            rows = [x.astype(value.dtype).reshape(-1, x.shape[-1]) for x in (g, t)]
            total += jnp.sum(jnp.einsum("ij,ij->i", *rows, precision="highest"))
    return total


def _value_type(*avals: ShapedArray, spec: Hashable, slots: int) -> list[ShapedArray]:
    scalar = avals[-1].sharding.update(spec=PartitionSpec())
    return [avals[-1].update(shape=(), weak_type=False, sharding=scalar)]


def _gradient_types(*avals: ShapedArray, spec: Hashable, slots: int) -> list[ShapedArray]:
    own = [aval.update(weak_type=False) for aval in avals[:slots]]
    return [*_value_type(*avals, spec=spec, slots=slots), *own]


def _split(
    args: Sequence[T], constants: int, given: Flags
) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
    border = len(given) + constants
    return args[: len(given)], args[len(given) : border], args[border:]


def _product_types(
    *avals: ShapedArray, spec: Hashable, constants: int, given: Flags, wanted: Flags
) -> list[ShapedArray]:
    slots, _, tangents = _split(avals, constants, given)
    asked = (slot for slot, flag in zip(slots, wanted, strict=True) if flag)
    return [rules.block_type(tangents[0].shape[0], slot) for slot in asked]


def _jvp_rule(
    name: str, primitive: Primitive, primals: PyTree, tangents: PyTree, **params: Unpack[_Params]
) -> tuple[list[Array], list[PyTree]]:
    constants, given = params["constants"], params["given"]
    fixed = len(given) + constants
    if not all(map(rules.is_zero, tangents[: len(given)])):
        raise rules.third_derivative(name, "jax.nn.log_softmax for a loss that has all of them")
    _check_data(name, tangents[len(given) : fixed])
    out = primitive.bind(*primals, **params)
    moved, present = rules.there(rules.nonzero(tangents[fixed:]))
    if not moved:
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    own = rules.narrowed(given, present)
    return out, primitive.bind(*primals[:fixed], *moved, **{**params, "given": own})


def _transpose_rule(
    primitive: Primitive, cotangents: PyTree, *args: PyTree, **params: Unpack[_Params]
) -> list[PyTree]:
    constants, given, wanted = params["constants"], params["given"], params["wanted"]
    slots, data, linear = _split(args, constants, given)
    asked = [ad.is_undefined_primal(x) for x in linear]
    moved, present = rules.there(rules.nonzero(cotangents))
    unknown: list[PyTree] = [None] * (len(slots) + len(data))
    if not moved:
        return unknown + [
            ad.Zero(x.aval) if a else None for x, a in zip(linear, asked, strict=True)
        ]
    swapped = {
        **params,
        "given": rules.narrowed(wanted, present),
        "wanted": rules.narrowed(given, asked),
    }
    out = iter(primitive.bind(*slots, *data, *moved, **swapped))
    return unknown + [next(out) if a else None for a in asked]


def _product_batching_rule(
    primitive: Primitive,
    args: Sequence[Array],
    axes: Sequence[int | None],
    **params: Unpack[_Params],
) -> tuple[list[Array], list[int]]:
    """Tangents of the same slots become one block."""
    fixed = len(params["given"]) + params["constants"]
    if any(axis is not None for axis in axes[:fixed]):
        return rules.one_by_one(primitive, args, axes, **params)
    return rules.in_longer_block(primitive, args, axes, fixed, params)
