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
from typing import Any, Generic, TypedDict

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.sharding import PartitionSpec

from curvax.jax_internals import ad, batching
from curvax.ops.dtypes import compute_dtype
from curvax.ops.manual_axes import equally_varying
from curvax.second_order import rules
from curvax.second_order.rules import Flags, T

Tangents = Sequence[Array | None]
_KEPT = 3


class _Params(TypedDict):
    """Of an equation with a product: whether it has an upstream gradient, and an image."""

    spec: Hashable
    slots: int
    data: int
    upstream: bool
    image: bool
    given: Flags
    wanted: Flags


@dataclasses.dataclass(frozen=True)
class VectorMap:
    """How to compute a function of slots, given data that are not differentiated.

    Every array has a leading batch axis: that of the first `batched` slots has the size of the
    batch, that of others has it or is 1. `kept` is what `value` returned, blocks of tangents have a
    leading axis b, tangents are None where they are zero, and so is a result that is not wanted.

    Attributes:
        name: for messages, and of the primitive.
        data: what the data are, for messages.
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
    data: str
    remedy: str
    batched: int
    value: Callable[..., tuple[Array, Array, Array]]
    tangents: Callable[..., tuple[Array, Array]]
    pullback: Callable[..., tuple[Array, ...]]
    curvature: Callable[..., tuple[Array, ...]]
    bend: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class _Operands(Generic[T]):
    """Of a product, or their tangents, or their batch axes."""

    slots: list[T]
    data: list[T]
    kept: list[T]
    upstream: T | None
    tangents: list[T]
    image: list[T]

    @classmethod
    def of(cls, args: Sequence[T], params: _Params) -> _Operands[T]:
        left = list(args)

        def take(count: int) -> list[T]:
            taken = left[:count]
            del left[:count]
            return taken

        slots, data, kept = take(params["slots"]), take(params["data"]), take(_KEPT)
        upstream = take(1)[0] if params["upstream"] else None
        return cls(slots, data, kept, upstream, take(sum(params["given"])), left)

    @property
    def fixed(self) -> list[T]:
        """All but tangents and their image."""
        upstream = [] if self.upstream is None else [self.upstream]
        return [*self.slots, *self.data, *self.kept, *upstream]


class TwiceDifferentiableMap:
    """A `VectorMap` with the rules that JAX's transformations need."""

    def __init__(self, own: VectorMap) -> None:
        self._own = own

        def value(*args: Array, spec: Hashable, slots: int) -> tuple[Array, ...]:
            return own.value(spec, args[:slots], args[slots:])

        def bend(*args: Array, flags: tuple[Flags, Flags], **params: Any) -> list[Array]:
            at, x, image, other = _split_bend(args, flags, params)
            return [own.bend(params["spec"], at.slots, at.data, at.kept, x, image, other)]

        self._value = rules.primitive(own.name, value, _value_types, ("spec", "slots"))
        static = tuple(_Params.__annotations__)
        self._product = rules.primitive(
            f"{own.name}_product", self._evaluate, _product_types, static
        )
        self._bend = rules.primitive(
            f"{own.name}_bend", bend, _bend_type, ("spec", "slots", "data", "flags")
        )
        ad.primitive_jvps[self._value] = self._value_rule
        ad.primitive_jvps[self._product] = self._product_rule
        ad.primitive_jvps[self._bend] = self._bend_rule
        ad.primitive_transposes[self._product] = self._product_transpose
        ad.primitive_transposes[self._bend] = self._bend_transpose
        batching.primitive_batchers[self._value] = self._value_batched
        batching.primitive_batchers[self._product] = self._product_batched
        batching.primitive_batchers[self._bend] = lambda args, axes, **params: rules.one_by_one(
            self._bend, args, axes, **params
        )

    def __call__(self, spec: Hashable, slots: Sequence[Array], data: Sequence[Array]) -> Array:
        """The value.

        Args:
            spec: static options, passed on.
            slots: what may be differentiated.
            data: what may not.
        """
        slots, data = equally_varying(slots, data)
        return self._value.bind(*slots, *data, spec=spec, slots=len(slots))[0]

    def _evaluate(self, *args: Array, **params: Any) -> Sequence[Array]:
        own, at, spec = self._own, _Operands.of(args, params), params["spec"]  # type: ignore[arg-type]
        *x, g = rules.filled(at.tangents, params["given"])
        *wanted, out_wanted = params["wanted"]
        here = (spec, at.slots, at.data, at.kept)
        if not any(params["given"][:-1]):
            return own.pullback(*here, g, wanted)
        image = tuple(at.image) or own.tangents(*here, x)
        products: tuple[Array, ...] = ()
        if at.upstream is not None and any(wanted):
            products = own.curvature(*here, at.upstream, x, g, image, wanted)
        return (*products, *image) if out_wanted else products

    def _bind(
        self,
        at: _Operands[Any],
        tangents: Tangents,
        wanted: Sequence[bool],
        upstream: Array | None,
        image: Sequence[Array | None],
        spec: Hashable,
    ) -> list[Array]:
        """The product with a block, at the same slots."""
        known, _ = rules.there([upstream])
        moved, given = rules.there(tangents)
        whole, flags = rules.there(image)
        hints = whole if flags and all(flags) and any(given[:-1]) else []
        groups = equally_varying(at.slots, at.data, at.kept, known, moved, hints)
        return self._product.bind(
            *(x for group in groups for x in group),
            spec=spec,
            slots=len(at.slots),
            data=len(at.data),
            upstream=bool(known),
            image=bool(hints),
            given=given,
            wanted=tuple(wanted),
        )

    def _image(self, at: _Operands[Any], x: Tangents, spec: Hashable) -> list[Array]:
        """`J x` and the tangent of the statistic, for a block."""
        wanted = [False] * len(x) + [True]
        return self._bind(at, [*x, None], wanted, None, [], spec)

    def _value_rule(
        self, primals: Sequence[Array], tangents: Sequence[Any], spec: Hashable, slots: int
    ) -> tuple[list[Array], list[Any]]:
        rules.check_data(self._own.name, tangents[slots:], self._own.data)
        out, shift, statistic = self._value.bind(*primals, spec=spec, slots=slots)
        x = [None if t is None else t[None] for t in rules.nonzero(tangents[:slots])]
        kept = [out, shift, statistic]
        if not any(t is not None for t in x):
            return kept, [_zero(y) for y in kept]
        at = _Operands(list(primals[:slots]), list(primals[slots:]), kept, None, [], [])
        tangent, of_statistic = self._image(at, x, spec)
        return kept, [tangent[0], _zero(shift), of_statistic[0]]

    def _product_rule(
        self, primals: Sequence[Array], tangents: Sequence[Any], **params: Any
    ) -> tuple[list[Array], list[Any]]:
        at, along = (_Operands.of(x, params) for x in (primals, tangents))  # type: ignore[arg-type]
        rules.check_data(self._own.name, along.data, self._own.data)
        out = self._product.bind(*primals, **params)
        moved, linear = rules.nonzero(along.slots), rules.nonzero(along.tangents)
        moving = any(t is not None for t in moved)
        if params["upstream"] and (moving or not rules.is_zero(along.upstream)):
            raise rules.third_derivative(self._own.name, self._own.remedy)
        spec, wanted, given = params["spec"], params["wanted"], params["given"]
        if moving and given[-1]:
            image = rules.nonzero([along.kept[0], along.kept[2]])
            return out, self._bent_pullback(at, moved, linear[0], image, wanted, spec)
        total: list[Any] = [_zero(y) for y in out]
        if any(t is not None for t in linear):
            own = rules.filled(linear, given)
            image = rules.nonzero(along.image)
            total = list(self._bind(at, own, wanted, at.upstream, image, spec))
        if moving:
            bent = self._bind_bend(at, rules.filled(at.tangents, given)[:-1], out, moved, spec)
            total[0] = bent if rules.is_zero(total[0]) else total[0] + bent
        return out, total

    def _bent_pullback(
        self,
        at: _Operands[Array],
        moved: Tangents,
        upstream_tangents: Array | None,
        image: Tangents,
        wanted: Flags,
        spec: Hashable,
    ) -> list[Array]:
        """The derivative of `Jᵀ G`, of each G of a block: the product with that upstream."""
        x, hint = ([None if t is None else t[None] for t in group] for group in (moved, image))

        def one(upstream: Array, g: Array | None) -> list[Array]:
            tangents = [*x, None if g is None else g[None]]
            return [y[0] for y in self._bind(at, tangents, wanted, upstream, hint, spec)]

        return _over_block(one, at.tangents[0], upstream_tangents)

    def _bind_bend(
        self,
        at: _Operands[Array],
        x: Tangents,
        image: Sequence[Array],
        other: Tangents,
        spec: Hashable,
    ) -> Array:
        there = [rules.there(group) for group in (x, other)]
        groups = equally_varying(at.slots, at.data, at.kept, there[0][0], image, there[1][0])
        return self._bend.bind(
            *(x for group in groups for x in group),
            spec=spec,
            slots=len(at.slots),
            data=len(at.data),
            flags=(there[0][1], there[1][1]),
        )[0]

    def _bend_rule(
        self, primals: Sequence[Array], tangents: Sequence[Any], **params: Any
    ) -> tuple[list[Array], list[Any]]:
        flags, spec = params["flags"], params["spec"]
        at, x, image, other = _split_bend(primals, flags, params)
        along, along_x, _, along_other = _split_bend(tangents, flags, params)
        if not all(map(rules.is_zero, along.slots)):
            raise rules.third_derivative(self._own.name, self._own.remedy)
        rules.check_data(self._own.name, along.data, self._own.data)
        out = self._bend.bind(*primals, **params)
        own_x = [None if t is None or rules.is_zero(t) else t for t in along_x]
        own_other = [None if t is None or rules.is_zero(t) else t for t in along_other]
        total: list[Any] = [_zero(out[0])]
        if any(t is not None for t in own_other):
            total = [self._bind_bend(at, x, image, own_other, spec)]
        if any(t is not None for t in own_x):
            # Symmetric in its two tangents, and linear, for a transpose, in the second.
            first = [None if t is None else t[None] for t in other]
            hint = self._image(at, first, spec)

            def one(*second: Array | None) -> list[Array]:
                return [self._bind_bend(at, first, hint, second, spec)[0]]

            (bent,) = _over_block(one, *own_x)
            total = [bent if rules.is_zero(total[0]) else total[0] + bent]
        return out, total

    def _product_transpose(self, cotangents: Sequence[Any], *args: Any, **params: Any) -> list[Any]:
        at = _Operands.of(args, params)  # type: ignore[arg-type]
        given, wanted = params["given"], params["wanted"]
        # That of the statistic is zero, if not by its type.
        cotangents = cotangents[: sum(wanted)]
        asked = [ad.is_undefined_primal(x) for x in at.tangents]
        moved, present = rules.there(rules.nonzero(cotangents))
        linear = [*at.tangents, *at.image]
        out: list[Any] = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in linear]
        if moved and any(asked):
            own = rules.filled(moved, rules.narrowed(wanted, present))
            flags = rules.narrowed(given, asked)
            results = iter(self._bind(at, own, flags, at.upstream, [], params["spec"]))
            out[: len(asked)] = [next(results) if a else None for a in asked]
        return [None] * len(at.fixed) + out

    def _bend_transpose(self, cotangents: Sequence[Any], *args: Any, **params: Any) -> list[Any]:
        flags = params["flags"]
        at, x, image, other = _split_bend(args, flags, params)
        asked = [ad.is_undefined_primal(t) for t in other]
        count = sum(asked)
        unknown: list[Any] = [None] * (len(args) - count)
        (cotangent,) = cotangents
        if rules.is_zero(cotangent):
            return unknown + [ad.Zero(t.aval) for t in args[-count:]]
        wanted = [*asked, False]

        def one(upstream: Array, *tangents: Array | None) -> list[Array]:
            block = [None if t is None else t[None] for t in tangents]
            own, hint = [*block[:-2], None], block[-2:]
            return [y[0] for y in self._bind(at, own, wanted, upstream, hint, params["spec"])]

        results = _over_block(one, cotangent, *x, *image)
        return unknown + [jnp.sum(y, axis=0) for y in results]

    def _value_batched(
        self,
        args: Sequence[Array],
        axes: Sequence[int | None],
        spec: Hashable,
        slots: int,
    ) -> tuple[list[Array], list[int]]:
        size, batch = rules.mapped_size(args, axes), _batch_size(args[0], axes[0])
        folded = [
            _into_batch(x, axis, size, batch, i < self._own.batched)
            for i, (x, axis) in enumerate(zip(args, axes, strict=True))
        ]
        out = self._value.bind(*folded, spec=spec, slots=slots)
        return [y.reshape(size, batch, *y.shape[1:]) for y in out], [0] * len(out)

    def _product_batched(
        self, args: Sequence[Array], axes: Sequence[int | None], **params: Any
    ) -> tuple[list[Array], list[int]]:
        at = _Operands.of(args, params)  # type: ignore[arg-type]
        size, fixed = rules.mapped_size(args, axes), len(at.fixed)
        if any(axis is not None for axis in axes[:fixed]):
            return self._product_in_batch(args, axes, at, params)
        tangents = zip(args[fixed:], axes[fixed:], strict=True)
        folded = [rules.fold_block(x, axis, size) for x, axis in tangents]
        out = self._product.bind(*args[:fixed], *folded, **params)
        return [y.reshape(size, -1, *y.shape[1:]) for y in out], [0] * len(out)

    def _product_in_batch(
        self, args: Sequence[Array], axes: Sequence[int | None], at: _Operands[Array], params: Any
    ) -> tuple[list[Array], list[int]]:
        """Mapped slots lengthen the batch."""
        size, batch = rules.mapped_size(args, axes), _batch_size(args[0], axes[0])
        slots, data, fixed = len(at.slots), len(at.data), len(at.fixed)
        wanted = params["wanted"]
        # Of a slot that the batch shares each that is mapped has a gradient, and a tangent.
        whole = [
            i < self._own.batched or wanted[i] or params["given"][i] for i in range(slots)
        ]
        whole += [False] * data + [True] * (fixed - slots - data)
        folded = [
            _into_batch(x, axis, size, batch, all_of_it)
            for x, axis, all_of_it in zip(args[:fixed], axes[:fixed], whole, strict=True)
        ]
        for x, axis in zip(args[fixed:], axes[fixed:], strict=True):
            block = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x
            into = functools.partial(_into_batch, axis=0, size=size, batch=batch, whole=True)
            folded.append(jax.vmap(into, in_axes=1)(jnp.moveaxis(block, axis or 0, 0)))
        out = self._product.bind(*folded, **params)
        sizes = [_batch_size(x, axis) for x, axis in zip(at.slots, axes, strict=False)]
        asked = [n for n, flag in zip(sizes, wanted, strict=False) if flag]
        parts = []
        for y, n in zip(out, [*asked, batch, batch], strict=False):
            parts.append(y.reshape(y.shape[0], size, batch, *y.shape[2:]))
            if n < batch:
                parts[-1] = jnp.sum(parts[-1], axis=2, keepdims=True)
        return parts, [1] * len(out)


def _zero(y: Array) -> Any:
    return ad.Zero(jax.typeof(y).to_tangent_aval())


def _over_block(one: Callable[..., list[Array]], *blocks: Array | None) -> list[Array]:
    """`one` of each entry of blocks, or of None."""
    if next(x for x in blocks if x is not None).shape[0] > 1:
        return jax.vmap(one)(*blocks)
    return [y[None] for y in one(*(None if x is None else x[0] for x in blocks))]


def _split_bend(
    args: Sequence[T], flags: tuple[Flags, Flags], params: Any
) -> tuple[_Operands[T], list[T | None], list[T], list[T | None]]:
    """The slots and the like, x, its image, and the other tangent."""
    first, second = map(sum, flags)
    border = len(args) - first - second - 2
    plain: Any = {**params, "upstream": False, "given": ()}
    at, rest = _Operands.of(args[:border], plain), args[border:]
    x, other = rules.filled(rest[:first], flags[0]), rules.filled(rest[first + 2 :], flags[1])
    return at, x, list(rest[first : first + 2]), other


def _value_types(*avals: ShapedArray, spec: Hashable, slots: int) -> list[ShapedArray]:
    out = avals[0].update(weak_type=False)
    layout = out.sharding.update(spec=PartitionSpec(*out.sharding.spec[:-1]))
    row = out.update(shape=out.shape[:-1], dtype=compute_dtype(out.dtype), sharding=layout)
    return [out, row, row]


def _product_types(*avals: ShapedArray, **params: Any) -> list[ShapedArray]:
    at, wanted = _Operands.of(avals, params), params["wanted"]  # type: ignore[arg-type]
    results = [slot for slot, flag in zip(at.slots, wanted, strict=False) if flag]
    results += [at.kept[0], at.kept[2]] if wanted[-1] else []
    return [rules.block_type(at.tangents[0].shape[0], aval) for aval in results]


def _bend_type(*avals: ShapedArray, flags: tuple[Flags, Flags], **params: Any) -> list[ShapedArray]:
    at, x, _, _ = _split_bend(avals, flags, params)
    (first, *_), _ = rules.there(x)
    return [rules.block_type(first.shape[0], at.kept[0])]


def _batch_size(x: Array, axis: int | None) -> int:
    """The size of the batch axis, the first but for the one that is mapped."""
    return x.shape[1 if axis == 0 else 0]


def _into_batch(x: Array, axis: int | None, size: int, batch: int, whole: bool) -> Array:
    """`x` with what is mapped as the slower part of the batch axis.

    Args:
        x: an array with a batch axis of 1 or `batch`.
        axis: what is mapped, or None.
        size: of what is mapped.
        batch: the size of the batch.
        whole: whether it needs the whole batch, where nothing is mapped and its axis is 1.
    """
    if axis is None and not whole and x.shape[0] == 1:
        return x
    mapped = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
    return jnp.broadcast_to(mapped, (size, batch, *mapped.shape[2:])).reshape(
        size * batch, *mapped.shape[2:]
    )
