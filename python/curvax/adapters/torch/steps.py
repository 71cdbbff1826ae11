"""Steps of a module that depend on the values of a batch, as `if mask.all()` or `x[mask]`.

A program of JAX takes the same steps for every batch, hence those of the batch that it was made
with. torch tells which they are, in a run that also follows what depends on the parameters: the
values of such tensors are not taken, since they change with them.
"""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from curvax.adapters.torch.bridge import home
from curvax.typing import Batch, PyTree

_T = torch.Tensor
# What looks at values: it returns numbers, or tensors of a shape that depends on them.
_LOOKING = {
    *(_T.item, _T.__bool__, _T.__int__, _T.__float__, _T.__index__, _T.tolist, _T.numpy),
    *(_T.nonzero, torch.nonzero, torch.argwhere, _T.argwhere, _T.masked_select),
    *(torch.masked_select, _T.unique, torch.unique, torch.unique_consecutive, torch.bincount),
    *(_T.bincount, torch.equal, _T.equal, torch.allclose, _T.allclose, torch.repeat_interleave),
    *(_T.repeat_interleave, _T.__getitem__, _T.__setitem__, torch.where),
    torch.nn.functional.one_hot,
}

# What takes parts of its first argument, whose values are not looked at.
_TAKING = {
    *(_T.__getitem__, _T.__setitem__, torch.masked_select, _T.masked_select),
    *(torch.repeat_interleave, _T.repeat_interleave),
}

# Of torch and of the adapters.
_NO_PLACES = (home("torch"), home("curvax") + "adapters")

Place = tuple[str, int, str]
"""A file, a line and the name of a function."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a module looked at in one call.

    Attributes:
        values: by place, of each call there, the tensors that it was given: their values, or None
            where these are not looked at or depend on the parameters.
    """

    values: Mapping[Place, Sequence[Sequence[torch.Tensor | None]]]

    def difference(self, other: "Steps") -> Place | None:
        """Where another call looked at other values; None if at the same."""
        for place in {**self.values, **other.values}:
            ours, theirs = self.values.get(place, ()), other.values.get(place, ())
            if len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
                return place
        return None


def _same(ours: Sequence[torch.Tensor | None], theirs: Sequence[torch.Tensor | None]) -> bool:
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | (a != a) & (b != b)).all())  # NaN is NaN


class Recording(TorchFunctionMode):
    """Records the steps of a call in torch."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._values: dict[Place, list[list[torch.Tensor | None]]] = defaultdict(list)
        # Those that depend on the parameters and do not tell, as integers and what no_grad gives.
        self._following: MutableMapping[torch.Tensor, bool] = WeakIdKeyDictionary()
        for parameter in parameters:
            self._following[parameter] = True

    def steps(self) -> Steps:
        """What was recorded."""
        return Steps(self._values)

    def __torch_function__(
        self,
        func: Callable[..., PyTree],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> PyTree:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        follows = [x.requires_grad or x in self._following for x in given]
        if looks(func, args, kwargs):
            passed = [True, *follows[1:]] if func in _TAKING else follows
            self._values[place_of(func)].append(
                [None if p else x.detach().clone() for x, p in zip(given, passed, strict=True)]
            )
        out = func(*args, **kwargs)
        if any(follows):
            changed = given[:1] if writes(func) or kwargs.get("inplace") else []
            for x in (*tree_leaves(out), *changed):
                if isinstance(x, torch.Tensor):
                    self._following[x] = True
        return out


def looks(func: Callable[..., PyTree], args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether a function looks at the values of a tensor."""
    if func not in _LOOKING:
        return False
    if func in (_T.__getitem__, _T.__setitem__):
        return any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in tree_leaves(args[1])
        )
    if func is torch.where:
        return len(args) + len(kwargs) == 1
    if func is torch.nn.functional.one_hot:  # else as many classes as the largest says
        return (args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) == -1
    if func in (_T.repeat_interleave, torch.repeat_interleave):
        repeats = [*args[1:], *kwargs.values()]
        return not repeats or any(isinstance(x, torch.Tensor) for x in repeats)
    return True


def writes(func: Callable[..., PyTree]) -> bool:
    """Whether one of torch's functions changes its first argument, by its name."""
    name = func.__name__
    if name.startswith("__"):
        return name in {"__setitem__", "__set__"} | _IN_PLACE
    return name.endswith("_")


_IN_PLACE = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or")
} | {"__ixor__", "__ilshift__", "__irshift__"}


def place_of(func: Callable[..., PyTree]) -> Place:
    """Where a function is called, outside torch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NO_PLACES):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, func.__name__


class Following:
    """The steps of a recorded call, taken again by one that JAX traces.

    Attributes:
        looked_at: pairs of a traced tensor and the value that was taken for it.
    """

    def __init__(self, steps: Steps) -> None:
        self._left: dict[Place, Iterator[Sequence[torch.Tensor | None]]] = {
            place: iter(calls) for place, calls in steps.values.items()
        }
        self.looked_at: list[tuple[torch.Tensor, torch.Tensor]] = []

    def taken(
        self,
        func: Callable[..., PyTree],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        traced: Any,
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments of a function that looks at values, with recorded ones in their place."""
        known = next(self._left.get(place_of(func), iter(())), None)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if known is None or len(known) != len(given):
            return args, kwargs
        values = {}
        for x, value in zip(given, known, strict=True):
            if isinstance(x, traced) and value is not None and value.shape == x.shape:
                self.looked_at.append((x, value))
                values[id(x)] = value
        return tree_map_only(torch.Tensor, lambda x: values.get(id(x), x), (args, kwargs))


class StepsOfBatches:
    """The steps that a module and its loss take on batches, by the shapes of these."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Steps] = {}

    def following(self, batch: Batch) -> Following:
        """The steps to take on a batch of these shapes."""
        return Following(self._known.get(_shapes(batch), Steps({})))

    def admit(self, batch: Batch, steps: Steps) -> None:
        """Take note of the steps taken on a batch.

        Raises:
            ValueError: another batch of the same shapes has other steps.
        """
        known = self._known.setdefault(_shapes(batch), steps)
        if (place := known.difference(steps)) is not None:
            raise ValueError(
                "what module or loss do depends on the values of the batch, by "
                f"{place[2]} in line {place[1]} of {place[0]!r}, and they are not the same in all "
                "batches: make an operator of each batch, or let torch multiply by its own double "
                "backward: adapters.torch.double_backward(module, loss, batches)"
            )


def _shapes(batch: Batch) -> Hashable:
    return jax.tree.structure(batch), *(jnp.shape(leaf) for leaf in jax.tree.leaves(batch))
