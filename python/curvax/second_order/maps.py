"""Array-valued functions whose derivatives to second order are computed by code of their own.

For `O = f(X)` of slots X and an upstream gradient G, the Hessian of `<G, f(X)>` in `(X, G)` maps
tangents `(x, g)` to `(dx, do)`:

    do = J x        dx = Jᵀ g + H_G x

with the Jacobian J of f at X, and the second derivative H_G of `<G, f>`. It is symmetric, its own
transpose, and one primitive, the *product*. Without an upstream gradient it is J alone or Jᵀ alone,
by what is given, and its derivative in X is the product with G, or, of J, `f''(x, x')`, which is
linear in x' and transposes to the product.

Beside O, f returns two statistics of each row, so that derivatives need not sum over rows again: a
shift, which counts as constant, and a statistic relative to it. Who computes `J x` gets the tangent
of the statistic too. This *image* of x is at hand where the product at X along x is wanted: JAX
hands it over as the tangents of O and of the statistic. It is a function of x, so a transpose
leaves it out of account, and gives it the cotangent zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Unpack

import jax.numpy as jnp
from jax import Array

from curvax.jax_internals import ad, batching
from curvax.ops.manual_axes import equally_varying
from curvax.second_order import rules
from curvax.second_order.batches import batch_size, in_longer_batch
from curvax.second_order.operands import (
    KEPT,
    BendOperands,
    BendParams,
    Operands,
    Params,
    bend_type,
    one_tangent_block,
    over_block,
    product_types,
    value_types,
    zero,
)
from curvax.second_order.rules import Flags
from curvax.typing import PyTree

Tangents = Sequence[Array | None]
Result = tuple[Sequence[Array], Sequence[PyTree]]


@dataclasses.dataclass(frozen=True)
class VectorMap:
    """How to compute a function of slots, given data, integers or flags.

    Every array has a leading batch axis: that of the first `batched` slots has the size of the
    batch, that of others has it or is 1. `kept` is what `value` returned, blocks of tangents have a
    leading axis b, tangents are None where they are zero, and so is a result that is not wanted.

    Attributes:
        name: for messages, and of the primitive.
        remedy: what has a third derivative, for messages.
        batched: the number of slots whose batch axis is whole.
        value: `(spec, slots, data) -> (out, shift, statistic)`; `out` has the type of the first
            slot, the others its shape without the last axis, in the dtype of the computation.
        tangents: `(spec, slots, data, kept, x) -> image`, the tangents of `out` and the statistic.
        pullback: `(spec, slots, data, kept, g, wanted) -> one array per slot that is wanted`.
        curvature: `(spec, slots, data, kept, upstream, x, g, image, wanted)`, likewise.
        bend: `(spec, slots, data, kept, x, image, other) -> f''(x, other)`; `other` is one tangent.
    """

    name: str
    remedy: str
    batched: int
    value: Callable[..., tuple[Array, Array, Array]]
    tangents: Callable[..., tuple[Array, Array]]
    pullback: Callable[..., tuple[Array, ...]]
    curvature: Callable[..., tuple[Array, ...]]
    bend: Callable[..., Array]


class TwiceDifferentiableMap:
    """A `VectorMap` with the rules that JAX's transformations need."""

    def __init__(self, own: VectorMap) -> None:
        self._own = own

        def value(*args: Array, spec: Hashable, slots: int) -> tuple[Array, ...]:
            return own.value(spec, args[:slots], args[slots:])

        def bend(*args: Array, **params: Unpack[BendParams]) -> list[Array]:
            by = BendOperands.of(args, params)
            here = (params["spec"], by.at.slots, by.at.data, by.at.kept)
            return [own.bend(*here, by.block, by.image, by.other)]

        self._value = rules.primitive(own.name, value, value_types, ("spec", "slots"))
        self._product = rules.primitive(
            f"{own.name}_product", self._evaluate, product_types, tuple(Params.__annotations__)
        )
        self._bend = rules.primitive(
            f"{own.name}_bend", bend, bend_type, tuple(BendParams.__annotations__)
        )
        ad.primitive_jvps[self._value] = self._value_rule
        ad.primitive_jvps[self._product] = self._product_rule
        ad.primitive_jvps[self._bend] = self._bend_rule
        ad.primitive_transposes[self._product] = self._product_transpose
        ad.primitive_transposes[self._bend] = self._bend_transpose
        batching.primitive_batchers[self._value] = self._value_batched
        batching.primitive_batchers[self._product] = self._product_batched
        batching.primitive_batchers[self._bend] = functools.partial(rules.one_by_one, self._bend)

    def __call__(self, spec: Hashable, slots: Sequence[Array], data: Sequence[Array]) -> Array:
        """The value.

        Args:
            spec: static options, passed on.
            slots: what may be differentiated.
            data: what may not.
        """
        slots, data = equally_varying(slots, data)
        return self._value.bind(*slots, *data, spec=spec, slots=len(slots))[0]

    def _evaluate(self, *args: Array, **params: Unpack[Params]) -> Sequence[Array]:
        own, at = self._own, Operands.of(args, params)
        *x, g = rules.filled(at.tangents, params["given"])
        *wanted, out_wanted = params["wanted"]
        here = (params["spec"], at.slots, at.data, at.kept)
        if not any(params["given"][:-1]):
            return own.pullback(*here, g, wanted)
        image = tuple(at.image) or own.tangents(*here, x)
        products: tuple[Array, ...] = ()
        if at.upstream and any(wanted):
            products = own.curvature(*here, at.upstream[0], x, g, image, wanted)
        return (*products, *image) if out_wanted else products

    def _bind(
        self,
        at: Operands[Array],
        tangents: Tangents,
        wanted: Sequence[bool],
        upstream: Sequence[Array],
        image: Tangents,
        spec: Hashable,
    ) -> Sequence[Array]:
        """The product with a block, at the same slots; an image that is not whole is left out."""
        moved, given = rules.there(tangents)
        whole, flags = rules.there(image)
        if not (all(flags) and any(given[:-1])):
            whole = []
        groups = equally_varying(at.slots, at.data, at.kept, upstream, moved, whole)
        return self._product.bind(
            *(x for group in groups for x in group),
            spec=spec,
            slots=len(at.slots),
            data=len(at.data),
            upstream=bool(upstream),
            image=bool(whole),
            given=given,
            wanted=tuple(wanted),
        )

    def _bind_image(self, at: Operands[Array], x: Tangents, spec: Hashable) -> Sequence[Array]:
        """`J x` and the tangent of the statistic, for a block."""
        return self._bind(at, [*x, None], [False] * len(x) + [True], [], [], spec)

    def _bind_bend(
        self, at: Operands[Array], x: Tangents, image: Tangents, other: Tangents, spec: Hashable
    ) -> Array:
        block, of_block = rules.there(x)
        tangent, of_tangent = rules.there(other)
        hint, _ = rules.there(image)
        groups = equally_varying(at.slots, at.data, at.kept, block, hint, tangent)
        return self._bend.bind(
            *(x for group in groups for x in group),
            spec=spec,
            slots=len(at.slots),
            data=len(at.data),
            flags=(of_block, of_tangent),
        )[0]

    def _value_rule(
        self, primals: Sequence[Array], tangents: PyTree, spec: Hashable, slots: int
    ) -> Result:
        kept = self._value.bind(*primals, spec=spec, slots=slots)
        x = one_tangent_block(rules.nonzero(tangents[:slots]))
        if all(t is None for t in x):
            return kept, [zero(y) for y in kept]
        at = Operands(primals[:slots], primals[slots:], kept, [], [], [])
        out, statistic = self._bind_image(at, x, spec)
        return kept, [out[0], zero(kept[1]), statistic[0]]

    def _product_rule(
        self, primals: Sequence[Array], tangents: PyTree, **params: Unpack[Params]
    ) -> Result:
        at, along = Operands.of(primals, params), Operands.of(tangents, params)
        moved = rules.nonzero(along.slots)
        moving = any(t is not None for t in moved)
        if at.upstream and (moving or not rules.is_zero(along.upstream[0])):
            raise rules.third_derivative(self._own.name, self._own.remedy)
        out = self._product.bind(*primals, **params)
        spec, wanted, given = params["spec"], params["wanted"], params["given"]
        linear = rules.nonzero(along.tangents)
        if moving and given[-1]:
            image = rules.nonzero([along.kept[0], along.kept[2]])
            return out, self._pullback_derivative(at, moved, linear[0], image, wanted, spec)
        total = [zero(y) for y in out]
        if any(t is not None for t in linear):
            own, image = rules.filled(linear, given), rules.nonzero(along.image)
            total = list(self._bind(at, own, wanted, at.upstream, image, spec))
        if moving:
            own = rules.filled(at.tangents, given)[:-1]
            total = [_added(total[0], self._bind_bend(at, own, out, moved, spec)), *total[1:]]
        return out, total

    def _pullback_derivative(
        self,
        at: Operands[Array],
        moved: Tangents,
        upstream_tangents: Array | None,
        image: Tangents,
        wanted: Flags,
        spec: Hashable,
    ) -> list[Array]:
        """The derivative of `Jᵀ G`, of each G of a block: the product with that upstream."""
        x, hint = one_tangent_block(moved), one_tangent_block(image)

        def one(upstream: Array, g: Array | None) -> list[Array]:
            tangents = [*x, *one_tangent_block([g])]
            return [y[0] for y in self._bind(at, tangents, wanted, [upstream], hint, spec)]

        return over_block(one, at.tangents[0], upstream_tangents)

    def _bend_rule(
        self, primals: Sequence[Array], tangents: PyTree, **params: Unpack[BendParams]
    ) -> Result:
        by, along = BendOperands.of(primals, params), BendOperands.of(tangents, params)
        if not all(map(rules.is_zero, along.at.slots)):
            raise rules.third_derivative(self._own.name, self._own.remedy)
        out, spec = self._bend.bind(*primals, **params), params["spec"]
        block, other = _known(along.block), _known(along.other)
        total = zero(out[0])
        if any(t is not None for t in other):
            total = self._bind_bend(by.at, by.block, by.image, other, spec)
        if any(t is not None for t in block):
            # Symmetric in its two tangents, and linear, for a transpose, in the second.
            first = one_tangent_block(by.other)
            image = self._bind_image(by.at, first, spec)

            def one(*second: Array | None) -> list[Array]:
                return [self._bind_bend(by.at, first, image, second, spec)[0]]

            total = _added(total, over_block(one, *block)[0])
        return out, [total]

    def _product_transpose(
        self, cotangents: PyTree, *args: PyTree, **params: Unpack[Params]
    ) -> list[PyTree]:
        at, given, wanted = Operands.of(args, params), params["given"], params["wanted"]
        asked = [ad.is_undefined_primal(x) for x in at.tangents]
        # That of the statistic, the last where there is one, is zero, if not by its type.
        moved, present = rules.there(rules.nonzero(cotangents[: sum(wanted)]))
        linear = [*at.tangents, *at.image]
        out: list[PyTree] = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in linear]
        if moved and any(asked):
            own = rules.filled(moved, rules.narrowed(wanted, present))
            flags = rules.narrowed(given, asked)
            results = iter(self._bind(at, own, flags, at.upstream, [], params["spec"]))
            out[: len(asked)] = [next(results) if a else None for a in asked]
        return [None] * len(at.fixed) + out

    def _bend_transpose(
        self, cotangents: PyTree, *args: PyTree, **params: Unpack[BendParams]
    ) -> list[PyTree]:
        by = BendOperands.of(args, params)
        count = sum(params["flags"][1])
        unknown = [None] * (len(args) - count)
        if rules.is_zero(cotangents[0]):
            return unknown + [ad.Zero(t.aval) for t in args[-count:]]
        wanted = [*params["flags"][1], False]

        def one(upstream: Array, *tangents: Array | None) -> list[Array]:
            *x, out, statistic = one_tangent_block(tangents)
            image = [out, statistic]
            parts = self._bind(by.at, [*x, None], wanted, [upstream], image, params["spec"])
            return [y[0] for y in parts]

        results = over_block(one, cotangents[0], *by.block, *by.image)
        return unknown + [jnp.sum(y, axis=0) for y in results]

    def _value_batched(
        self, args: Sequence[Array], axes: Sequence[int | None], **params: object
    ) -> tuple[list[Array], list[int]]:
        whole = [i < self._own.batched for i in range(len(args))]
        sizes = [batch_size(args[0], axes[0])] * KEPT
        return in_longer_batch(self._value, args, axes, whole, 0, sizes, params)

    def _product_batched(
        self, args: Sequence[Array], axes: Sequence[int | None], **params: Unpack[Params]
    ) -> tuple[list[Array], list[int]]:
        at = Operands.of(args, params)
        fixed, wanted, given = len(at.fixed), params["wanted"], params["given"]
        if all(axis is None for axis in axes[:fixed]):
            return rules.in_longer_block(self._product, args, axes, fixed, params)
        slots, data = len(at.slots), len(at.data)
        # Of a slot that the batch shares each that is mapped has a gradient, and a tangent.
        whole = [i < self._own.batched or wanted[i] or given[i] for i in range(slots)]
        whole += [False] * data + [True] * (fixed - slots - data)
        sizes = [batch_size(x, axis) for x, axis in zip(at.slots, axes, strict=False)]
        asked = [n for n, flag in zip(sizes, wanted, strict=False) if flag] + [sizes[0]] * 2
        blocks = len(args) - fixed
        return in_longer_batch(self._product, args, axes, whole, blocks, asked, params)


def _known(tangents: Sequence[PyTree]) -> Tangents:
    return [None if t is None or rules.is_zero(t) else t for t in tangents]


def _added(x: PyTree, y: Array) -> Array:
    return y if rules.is_zero(x) else x + y
