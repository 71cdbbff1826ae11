"""One sample's part of what single equations compute, where that is known to be its own.

The samples of an array lie along one axis, the same number of places for each, in order. An
equation passes that on if its result has such an axis too, and each sample's part of it is what the
equation makes of the sample's parts of its operands, with parameters changed to their lengths.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jax import Array, lax

from curvax.jax_internals import BARRIER, ELEMENTWISE, SPLIT, JaxprEqn, known


class MixedError(Exception):
    """An equation whose result at one sample depends on the others."""


class UnfollowedError(Exception):
    """An equation through which the samples cannot be followed: they may mix or not."""


class Value(NamedTuple):
    """An array, whole, or the part of it that is one sample's.

    Attributes:
        array: the array, or its part.
        axis: that along which the samples lie; None of an array that is whole.
    """

    array: Any
    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One of the samples of a batch.

    Attributes:
        count: of the samples, at least 2.
        index: of the sample, an int32 scalar.
    """

    count: int
    index: Array

    def part(self, value: Value, axis: int) -> Value:
        """The part of a value along an axis.

        Raises:
            MixedError: its samples lie along another.
        """
        if value.axis == axis:
            return value
        if value.axis is not None:
            raise MixedError
        length = self.length(value.array.shape[axis])
        return Value(lax.dynamic_slice_in_dim(value.array, self.index * length, length, axis), axis)

    def length(self, whole: int) -> int:
        """How many of the places along an axis belong to a sample.

        Raises:
            UnfollowedError: they cannot be dealt out.
        """
        if whole == 0 or whole % self.count:
            raise UnfollowedError
        return whole // self.count


Rule = Callable[[Sample, JaxprEqn, list[Value]], Sequence[Value]]


def apply(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    """One sample's part of what an equation without loops, branches and calls computes.

    Raises:
        MixedError: samples mix in it.
        UnfollowedError: they may.
    """
    name = eqn.primitive.name
    rule = _elementwise if name in ELEMENTWISE else _RULES.get(name, _unknown)
    return rule(sample, eqn, operands)


def _bound(
    eqn: JaxprEqn, operands: Sequence[Value], axes: Sequence[int | None], **changed: object
) -> list[Value]:
    """The results of the equation's primitive, whose samples lie along these axes."""
    out = eqn.primitive.bind(*(value.array for value in operands), **{**eqn.params, **changed})
    results = out if eqn.primitive.multiple_results else [out]
    return [Value(array, axis) for array, axis in zip(results, axes, strict=True)]


def _unknown(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> NoReturn:
    raise UnfollowedError


def _shape(eqn: JaxprEqn, operand: int = 0) -> tuple[int, ...]:
    """Of an operand, whole."""
    aval: Any = eqn.invars[operand].aval
    return tuple(aval.shape)


def _of_one(operands: Sequence[Value]) -> tuple[Value, int]:
    """The operand that carries samples, all others being whole, and its axis."""
    carrying = [value for value in operands if value.axis is not None]
    if len(carrying) != 1:
        raise UnfollowedError
    (value,) = carrying
    assert value.axis is not None
    return value, value.axis


def _aligned(sample: Sample, operands: list[Value]) -> tuple[list[Value], int]:
    """Arrays of as many axes, cut along that of those that carry samples."""
    axis = next(value.axis for value in operands if value.axis is not None)
    return [sample.part(value, axis) for value in operands], axis


def _elementwise(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """An operand may be a scalar, or of length 1 along an axis: then it is the same for all."""
    axis = next(value.axis for value in operands if value.axis is not None)
    for i, value in enumerate(operands):
        same = value.axis is None and (not np.ndim(value.array) or _shape(eqn, i)[axis] == 1)
        operands[i] = value if same else sample.part(value, axis)
    return _bound(eqn, operands, [axis] * len(eqn.outvars))


def _barrier(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    return _bound(eqn, operands, [value.axis for value in operands])


def _broadcast_in_dim(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    value, axis = _of_one(operands)
    place = eqn.params["broadcast_dimensions"][axis]
    shape = list(eqn.params["shape"])
    shape[place] = value.array.shape[axis]
    return _bound(eqn, operands, [place], shape=tuple(shape))


def _reshape(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The samples are apart in the order of the numbers as long as what lies before them is."""
    _, axis = _of_one(operands)
    before, shape = math.prod(_shape(eqn)[:axis]), list(eqn.params["new_sizes"])
    if eqn.params["dimensions"] is not None:
        raise UnfollowedError
    places = (i for i, size in enumerate(shape) if size > 1 and math.prod(shape[:i]) == before)
    place = next(places, None)
    if place is None:
        raise UnfollowedError
    shape[place] = sample.length(shape[place])
    return _bound(eqn, operands, [place], new_sizes=tuple(shape))


def _squeeze(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, axis = _of_one(operands)
    gone = eqn.params["dimensions"]
    if axis in gone:
        raise UnfollowedError
    return _bound(eqn, operands, [axis - sum(other < axis for other in gone)])


def _transpose(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, axis = _of_one(operands)
    return _bound(eqn, operands, [eqn.params["permutation"].index(axis)])


def _reduce(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, axis = _of_one(operands)
    axes = eqn.params["axes"]
    if axis in axes:
        raise MixedError
    return _bound(eqn, operands, [axis - sum(other < axis for other in axes)])


def _along(parameter: str) -> Rule:
    """Of equations that mix what lies along the axis, or axes, in a parameter."""

    def rule(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
        operands, axis = _aligned(sample, operands)
        own = eqn.params[parameter]
        if axis in (own if isinstance(own, tuple) else (own,)):
            raise MixedError
        return _bound(eqn, operands, [axis] * len(eqn.outvars))

    return rule


def _concatenate(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    operands, axis = _aligned(sample, operands)
    if axis == eqn.params["dimension"]:
        raise UnfollowedError
    return _bound(eqn, operands, [axis])


def _top_k(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, axis = _of_one(operands)
    if axis == eqn.params.get("axis", len(_shape(eqn)) - 1):
        raise MixedError
    return _bound(eqn, operands, [axis] * 2)


def _pad(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, axis = _of_one(operands)
    if tuple(eqn.params["padding_config"][axis]) != (0, 0, 0):
        raise UnfollowedError
    return _bound(eqn, operands, [axis])


def _slice(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    value, axis = _of_one(operands)
    strides, limits = eqn.params["strides"], list(eqn.params["limit_indices"])
    whole = (0, _shape(eqn)[axis], 1)
    if (eqn.params["start_indices"][axis], limits[axis], (strides or {axis: 1})[axis]) != whole:
        raise MixedError
    limits[axis] = value.array.shape[axis]
    return _bound(eqn, operands, [axis], limit_indices=tuple(limits))


def _dynamic_slice(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    value, axis = _of_one(operands)
    sizes = list(eqn.params["slice_sizes"])
    if sizes[axis] != _shape(eqn)[axis]:  # else it begins at 0, wherever it is told to
        raise MixedError
    sizes[axis] = value.array.shape[axis]
    return _bound(eqn, operands, [axis], slice_sizes=tuple(sizes))


def _dynamic_update_slice(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    (operand, update), axis = _aligned(sample, operands[:2])
    if _shape(eqn, 0)[axis] != _shape(eqn, 1)[axis]:
        raise MixedError
    return _bound(eqn, [operand, update, *operands[2:]], [axis])


def _dot_general(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    contracted, paired = eqn.params["dimension_numbers"]
    for side, value in enumerate(operands):
        if value.axis in contracted[side]:
            raise MixedError
    for side, value in enumerate(operands):
        if value.axis in paired[side]:
            place = paired[side].index(value.axis)
            both = [sample.part(v, paired[s][place]) for s, v in enumerate(operands)]
            return _bound(eqn, both, [place])
    if all(value.axis is not None for value in operands):
        raise MixedError
    places = []
    for side in (0, 1):
        taken = (*contracted[side], *paired[side])
        places += [(side, axis) for axis in range(len(_shape(eqn, side))) if axis not in taken]
    _, axis = _of_one(operands)
    side = 0 if operands[0].axis is not None else 1
    place = len(paired[0]) + places.index((side, axis))
    return _bound(eqn, operands, [place])


def _convolution(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    lhs, _, out = eqn.params["dimension_numbers"]
    image, kernel = operands
    if image.axis != lhs[0] or kernel.axis is not None or eqn.params["batch_group_count"] != 1:
        raise UnfollowedError
    return _bound(eqn, operands, [out[0]])


_WINDOW = {
    "window_dimensions": 1,
    "window_strides": 1,
    "padding": (0, 0),
    "base_dilation": 1,
    "window_dilation": 1,
}


def _window(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    operands, axis = _aligned(sample, operands)
    if any(eqn.params[name][axis] != alone for name, alone in _WINDOW.items()):
        raise MixedError
    return _bound(eqn, operands, [axis])


def _split(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    _, axis = _of_one(operands)
    if eqn.params["axis"] == axis:
        raise MixedError
    return _bound(eqn, operands, [axis] * len(eqn.outvars))


def _gather(sample: Sample, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    numbers, sizes = eqn.params["dimension_numbers"], list(eqn.params["slice_sizes"])
    operand, indices = operands
    ours, theirs = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    ndim = len(eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]
    batched = [axis for axis in range(ndim) if axis not in numbers.offset_dims]
    if operand.axis in ours or indices.axis in theirs:
        # One index for each element along an axis that both have.
        place = ours.index(operand.axis) if operand.axis in ours else theirs.index(indices.axis)
        both = [sample.part(operand, ours[place]), sample.part(indices, theirs[place])]
        return _bound(eqn, both, [batched[theirs[place]]])
    if operand.axis is None:
        _, axis = _of_one(operands)
        if axis == len(_shape(eqn, 1)) - 1:
            raise UnfollowedError
        return _bound(eqn, operands, [batched[axis]])
    axis = operand.axis
    chosen = (*numbers.start_index_map, *numbers.collapsed_slice_dims)
    if indices.axis is not None or axis in chosen or sizes[axis] != _shape(eqn)[axis]:
        raise MixedError
    sizes[axis] = operand.array.shape[axis]
    gone = (*numbers.collapsed_slice_dims, *ours)
    kept = [other for other in range(len(sizes)) if other not in gone]
    place = numbers.offset_dims[kept.index(axis)]
    return _bound(eqn, operands, [place], slice_sizes=tuple(sizes))


def _table(*rules: tuple[Rule, Sequence[Any]]) -> dict[str, Rule]:
    return {primitive.name: rule for rule, primitives in rules for primitive in primitives}


_REDUCTIONS = (
    known.reduce_sum_p,
    known.reduce_max_p,
    known.reduce_min_p,
    known.reduce_prod_p,
    known.reduce_and_p,
    known.reduce_or_p,
    known.reduce_xor_p,
    known.argmax_p,
    known.argmin_p,
)
_CUMULATIVE = (
    known.cumsum_p,
    known.cumprod_p,
    known.cummax_p,
    known.cummin_p,
    known.cumlogsumexp_p,
)
_WINDOWS = (
    known.reduce_window_sum_p,
    known.reduce_window_max_p,
    known.reduce_window_min_p,
    known.select_and_gather_add_p,
)
_RULES: dict[str, Rule] = {
    **_table(
        (_broadcast_in_dim, [known.broadcast_in_dim_p]),
        (_reshape, [known.reshape_p]),
        (_squeeze, [known.squeeze_p]),
        (_transpose, [known.transpose_p]),
        (_reduce, _REDUCTIONS),
        (_along("axis"), _CUMULATIVE),
        (_along("dimension"), [known.sort_p]),
        (_concatenate, [known.concatenate_p]),
        (_along("dimensions"), [known.rev_p]),
        (_top_k, [known.top_k_p]),
        (_pad, [known.pad_p]),
        (_slice, [known.slice_p]),
        (_dynamic_slice, [known.dynamic_slice_p]),
        (_dynamic_update_slice, [known.dynamic_update_slice_p]),
        (_dot_general, [known.dot_general_p]),
        (_convolution, [known.conv_general_dilated_p]),
        (_window, _WINDOWS),
        (_gather, [known.gather_p]),
    ),
    SPLIT: _split,
    BARRIER: _barrier,
}
