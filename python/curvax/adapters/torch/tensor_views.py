"""Views in torchax: tensors that are a part of another's memory.

torchax has them of slices alone, and copies for `view`, `transpose`, `select` and the like: what a
module then writes into the copy is lost.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.typing import ArrayLike
from torch.utils import _pytree
from torch.utils._mode_utils import no_dispatch

from curvax.adapters.torch.tensor_registry import Register, unlisted
from curvax.typing import PyTree

Function = Callable[[jax.Array], jax.Array]
Place = Callable[[torch.Tensor], torch.Tensor]


def register_views(torchax: ModuleType, register: Register) -> None:
    """Let torchax return views where torch does, and mend its own.

    Args:
        torchax: the module.
        register: takes a lowering.
    """
    make = _maker(torchax)
    _mend(torchax)

    def getitem(x: torch.Tensor, index: PyTree) -> torch.Tensor:
        index = unlisted(index)
        if any(torch.is_tensor(i) or isinstance(i, np.ndarray) for i in _pytree.tree_leaves(index)):
            where = x._env.t2j_iso(index)
            return torchax.tensor.Tensor(x.jax()[where], x._env)
        return make(x, lambda array: array[index], lambda layout: layout[index], index)

    register(torch.Tensor.__getitem__, getitem, view=True)

    def lower(packet: "torch._ops.OpOverloadPacket", function: Callable[..., jax.Array]) -> None:
        def lowering(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            def place(layout: torch.Tensor) -> torch.Tensor:
                return packet(layout, *args, **kwargs)

            return make(x, lambda array: function(array, *args, **kwargs), place)

        register(packet, lowering, view=True)

    aten, lowered = torch.ops.aten, torchax.ops.jaten

    def as_strided(
        x: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
    ) -> torch.Tensor:
        if hasattr(x, "parent"):
            raise torchax.tensor.OperatorNotFound("as_strided of a view has no lowering")
        return make(
            x,
            lambda array: lowered._aten_as_strided(array, size, stride, offset or 0),
            lambda layout: layout.as_strided(size, stride, offset or 0),
        )

    register(aten.as_strided, as_strided, view=True)
    lower(aten.alias, lambda x: x)
    lower(aten.diagonal, lowered._aten_diagonal)
    lower(aten.expand, lambda x, sizes, implicit=False: lowered._aten_expand(x, sizes))
    lower(aten.narrow, lambda x, dim, start, length: _cut(x, dim, start, start + length))
    lower(aten.permute, jnp.transpose)
    lower(aten.select, lambda x, dim, index: x[_at(x, dim, index)])
    lower(aten.slice, lambda x, dim=0, start=None, end=None, step=1: _cut(x, dim, start, end, step))
    lower(aten.squeeze, lowered._aten_squeeze_dim)
    lower(aten.t, jnp.transpose)
    lower(aten.transpose, lowered._aten_transpose)
    lower(aten.mT, lambda x: jnp.swapaxes(x, -1, -2))
    lower(aten.unfold, lowered._aten_unfold)
    lower(aten.unsqueeze, lowered._aten_unsqueeze)
    lower(aten.view, jnp.reshape)


def _at(x: jax.Array, dim: int, index: object) -> tuple[object, ...]:
    return (slice(None),) * (dim % x.ndim) + (index,)


def _cut(x: jax.Array, dim: int, start: int | None, end: int | None, step: int = 1) -> jax.Array:
    return x[_at(x, dim, slice(start, end, step))]


def _maker(torchax: ModuleType) -> Callable[..., jax.Array]:
    """`make(x, function, place, index=None)`: the view `function` of a traced tensor."""

    class Part(torchax.view.ViewInfo):  # type: ignore[misc, name-defined]
        """What a view sees of its parent.

        Attributes:
            function: makes the view's array of the parent's.
            place: the same of a tensor of torch that has no memory, for its strides.
            shape: of the view.
            index: if `function` is `array[index]`.
        """

        def __init__(
            self, function: Function, place: Place, shape: tuple[int, ...], index: PyTree
        ) -> None:
            super().__init__()
            self.function, self.place, self.shape, self.index = function, place, shape, index

        def transform_tensor(self, jax_array: jax.Array) -> jax.Array:
            return self.function(jax_array)

        def update_tensor(self, new_value: ArrayLike, jax_array: jax.Array) -> jax.Array:
            new = jnp.broadcast_to(new_value, self.shape).astype(jax_array.dtype)
            if self.index is not None:
                return jax_array.at[self.index].set(new)
            with jax.ensure_compile_time_eval():
                numbers = jnp.arange(jax_array.size).reshape(jax_array.shape)
                places = np.asarray(self.function(numbers)).reshape(-1)
            once = len(np.unique(places)) == len(places)
            flat = jax_array.reshape(-1).at[places].set(new.reshape(-1), unique_indices=once)
            return flat.reshape(jax_array.shape)

        def calculate_output_shape(self, source: jax.Array) -> tuple[int, ...]:
            return self.shape

    def make(
        x: torch.Tensor, function: Function, place: Place, index: PyTree = None
    ) -> torch.Tensor:
        source = x.jax()
        value = function(source)
        if _copies(x, place):
            return torchax.tensor.Tensor(value, x._env)
        view = torchax.view.View(x, Part(function, place, value.shape, index), x._env)
        view.seen = (source, value)
        return view

    return make


def _copies(x: torch.Tensor, place: Place) -> bool:
    """Whether torch copies: `reshape` of a view whose elements do not lie in a row."""
    if not hasattr(x, "parent"):
        return False
    with no_dispatch(), torch._C.DisableTorchFunction():
        try:
            place(_layout(x))
        except RuntimeError:
            return True
    return False


def _layout(x: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that has a traced tensor's strides."""
    if not hasattr(x, "parent"):
        return torch.empty(tuple(x.jax().shape), device="meta")
    place: Callable[[torch.Tensor], torch.Tensor] = x.view_info.place
    return place(_layout(x.parent))


def _mend(torchax: ModuleType) -> None:
    """What torchax's classes of tensors do otherwise than torch's."""
    tensor, view = torchax.tensor.Tensor, torchax.view.View

    def array(self: torch.Tensor) -> jax.Array:
        source = self.parent.jax()
        if self.seen[0] is not source:  # written into since
            self.seen = (source, self.view_info.transform_tensor(source))
        found: jax.Array = self.seen[1]
        return found

    def setitem(self: torch.Tensor, key: PyTree, value: object) -> None:
        key, value = self._env.t2j_iso((unlisted(key), value))
        before = self.jax()
        value = jnp.asarray(value).astype(before.dtype)
        key = key[0] if isinstance(key, tuple) and len(key) == 1 else key
        if isinstance(key, (jax.Array, np.ndarray)) and key.dtype == bool:
            mask = jnp.asarray(key)
            after = torchax.ops.jaten._shape_static_boolean_index_put(before, mask, value)
        else:
            after = before.at[key].set(value)
        if isinstance(self, view):
            self.update(after)
        else:
            self._elem = after

    view.jax = array
    # By which torchax reads and replaces what a tensor holds.
    view._elem = property(array, lambda self, value: self.update(value))
    view.__setitem__ = tensor.__setitem__ = setitem
    view.data = property(lambda self: self.detach(), lambda self, other: self.update(other))
    # torch's own takes all negative axes, and returns a view.
    if "flatten" in vars(tensor):
        del tensor.flatten
