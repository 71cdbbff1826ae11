"""What the rules of scalars and of maps share.

Their products are linear in tangents with a leading block axis, into which `vmap` over tangents
folds, so that what depends on the slots alone is computed once for a block. An equation says which
tangents are `given`, the others being zero, and which results are `wanted`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.sharding import PartitionSpec

from curvax.jax_internals import Primitive, ad, mlir
from curvax.typing import PyTree

Flags = tuple[bool, ...]
T = TypeVar("T")


def primitive(
    name: str,
    evaluate: Callable[..., Sequence[Array]],
    types: Callable[..., Sequence[ShapedArray]],
    static: tuple[str, ...],
) -> Primitive:
    """An ordinary primitive, lowered as the operations of `evaluate`.

    Not `custom_jvp`: partial evaluation, as of the body of a scan, replaces such a function by its
    operations and forgets its rule, and a foreign call among them then refuses the next derivative.
    """
    made = Primitive(name)
    made.multiple_results = True
    made.def_impl(jax.jit(evaluate, static_argnames=static))
    made.def_abstract_eval(types)
    mlir.register_lowering(made, mlir.lower_fun(evaluate, multiple_results=True))
    return made


def is_zero(tangent: object) -> bool:
    """Whether a tangent or cotangent is zero by its type."""
    return isinstance(tangent, ad.Zero)


def nonzero(tangents: Iterable[PyTree]) -> list[Array | None]:
    """The tangents, None where one is zero by its type."""
    return [None if is_zero(t) else t for t in tangents]


def there(values: Iterable[T | None]) -> tuple[list[T], Flags]:
    """Those that are not None, and which they are."""
    values = list(values)
    return [x for x in values if x is not None], tuple(x is not None for x in values)


def filled(values: Iterable[T], flags: Flags) -> list[T | None]:
    """The inverse of `there`."""
    left = iter(values)
    return [next(left) if flag else None for flag in flags]


def third_derivative(name: str, remedy: str) -> NotImplementedError:
    """The error of who asks for one derivative too many."""
    return NotImplementedError(
        f"{name} is differentiable twice, and this asks for a third derivative; use {remedy}"
    )


def block_type(size: int, aval: ShapedArray) -> ShapedArray:
    """The type of a block of arrays of a type."""
    layout = aval.sharding.update(spec=PartitionSpec(None, *aval.sharding.spec))
    return aval.update(shape=(size, *aval.shape), weak_type=False, sharding=layout)


def narrowed(flags: Flags, present: Iterable[bool]) -> Flags:
    """The flags, of which those that are set are set where `present` is, one for each."""
    left = iter(present)
    return tuple(flag and next(left) for flag in flags)


def mapped_size(args: Sequence[Array], axes: Sequence[int | None]) -> int:
    """How many `vmap` maps over."""
    return next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)


def in_longer_block(
    primitive: Primitive,
    args: Sequence[Array],
    axes: Sequence[int | None],
    fixed: int,
    params: PyTree,
) -> tuple[list[Array], list[int]]:
    """Batching where blocks alone are mapped, the arguments after the first `fixed`."""
    size, folded = mapped_size(args, axes), []
    for x, axis in zip(args[fixed:], axes[fixed:], strict=True):
        block = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        folded.append(block.reshape(-1, *block.shape[2:]))
    out = primitive.bind(*args[:fixed], *folded, **params)
    return [y.reshape(size, -1, *y.shape[1:]) for y in out], [0] * len(out)


def one_by_one(
    primitive: Primitive, args: Sequence[Array], axes: Sequence[int | None], **params: object
) -> tuple[list[Array], list[int]]:
    """Batching where nothing is shared."""
    fixed = [arg for arg, axis in zip(args, axes, strict=True) if axis is None]
    mapped = [
        jnp.moveaxis(arg, axis, 0) for arg, axis in zip(args, axes, strict=True) if axis is not None
    ]

    def one(entry: list[Array]) -> list[Array]:
        shared, own = iter(fixed), iter(entry)
        operands = [next(shared if axis is None else own) for axis in axes]
        return primitive.bind(*operands, **params)

    out = jax.lax.map(one, mapped)
    return out, [0] * len(out)
