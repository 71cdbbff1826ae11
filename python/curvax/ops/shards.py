"""Arrays in shards, refused by what needs whole vectors: XLA would gather them in silence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning

from curvax.typing import PyTree

__all__ = ["whole"]


def whole(what: str, x: Array) -> Array:
    """`x`, a matrix that no sharding may divide.

    Where XLA decides how `x` is sharded, inside a `jit` over several devices, compilation fails
    with a `jax.errors.JaxRuntimeError` of the same text as the ValueError.

    Args:
        what: what it is, for the message.
        x: the matrix.

    Raises:
        ValueError: it lies in shards, or its type says that it will.
    """
    if not isinstance(x, jax.core.Tracer):
        _check(what, x.sharding.is_fully_replicated, x.sharding)
        return x
    spec = jax.typeof(x).sharding.spec
    _check(what, all(entry is None for entry in spec), spec)
    return _whole_when_compiled(what)(x)


def _check(what: str, is_whole: bool, sharding: object) -> None:
    if not is_whole:
        raise ValueError(
            f"{what} must lie whole on every device, since a basis cannot be sharded yet, got "
            f"shards, {sharding}: replicate the arrays that it comes from, parameters, vectors and "
            "data alike, jax.device_put(x, NamedSharding(mesh, PartitionSpec())), or bring all to "
            "one device, jax.device_put(x, jax.devices()[0])"
        )


@functools.cache
def _whole_when_compiled(what: str) -> Callable[[Array], Array]:
    """The identity, which XLA asks for its sharding where there is more than one device."""

    def partition(mesh: jax.sharding.Mesh, arguments: PyTree, result: PyTree) -> tuple[object, ...]:
        sharding = arguments[0].sharding
        _check(what, sharding.is_fully_replicated, sharding)
        # What comes after may want shards; of a whole array it takes its own.
        return mesh, lambda x: x, sharding, (sharding,)

    same: Any = custom_partitioning(lambda x: x)
    same.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, arguments, result: arguments[0].sharding,
        sharding_rule="i j -> i j",
    )
    # Which has no rule for `vmap`.
    call: Any = jax.custom_batching.custom_vmap(lambda x: same(x))
    call.def_vmap(lambda size, batched, x: (x, batched[0]))
    return call  # type: ignore[no-any-return]
