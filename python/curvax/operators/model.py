"""A model and its loss in one object, which every operator accepts in place of its parts."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from curvax.checks import shown
from curvax.filters import Filter, NamePattern
from curvax.operators.curvature import Curvature
from curvax.operators.foreign import adapter_of, is_pytree, refuse
from curvax.options import unknown
from curvax.typing import Batch, Batches, LossValue, Params, PyTree


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """Parameters, and the two functions that turn a batch into a loss.

    `hessian(model, batches)`, `ggn(model, batches)` and `fisher(model, batches)` take it apart.

    Attributes:
        params: a pytree of real floating arrays: what the operators differentiate in.
        forward: `forward(params, batch)` returns the outputs, as for `ggn`.
        loss: `loss(outputs, batch)` returns the mean loss or `(mean, weight)`, as for `ggn`.
        name_map: of parameters that come from elsewhere, each name there to the name of its leaf
            in `params`; tied parameters have several names and one leaf. Filters know all of them.
    """

    params: Params
    forward: Callable[[Params, Batch], PyTree]
    loss: Callable[[PyTree, Batch], LossValue]
    name_map: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, arguments in (("forward", "params"), ("loss", "outputs")):
            value = getattr(self, name)
            if not callable(value):
                raise TypeError(
                    f"Model({name}=...) must be callable as {name}({arguments}, batch), got "
                    f"{shown(value)}"
                )
        if not isinstance(self.name_map, Mapping):
            raise TypeError(
                "Model(name_map=...) must map names in the source to names of leaves of params, "
                f"got {shown(self.name_map)}"
            )

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        numbers = sum(int(np.size(leaf)) for leaf in leaves)
        return f"{type(self).__name__}({numbers:,} parameters in {len(leaves)} leaves)"

    def objective(self, params: Params, batch: Batch) -> PyTree:
        """The loss as a function of the parameters, as `hessian` takes it."""
        return self.loss(self.forward(params, batch), batch)

    def prepare(self, batches: Batches) -> PyTree:
        """The batches that an operator of this model is made of; adapters convert them here."""
        return batches

    def where(self, where: Filter | None) -> Filter | None:
        """A parameter filter that also finds leaves by their other names in `name_map`."""
        names = defaultdict(list)
        for alias, name in self.name_map.items():
            names[name].append(alias)
        if not callable(where) or all(own == [name] for name, own in names.items()):
            return where

        def any_name(name: str, leaf: object) -> bool:
            return any(where(alias, leaf) for alias in (name, *names[name]))

        if isinstance(where, NamePattern):
            # Keeps the patterns, which the message of a filter that finds nothing quotes.
            return NamePattern(where.patterns, lambda name, _: any_name(name, None))
        return any_name


R = TypeVar("R", bound=Curvature)


def accepts_model(
    parts: Callable[[Model], tuple[object, ...]],
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Let a function `f(*parts, batches, **options)` also be called as `f(model, batches, ...)`.

    Overloads say the types of both.

    Args:
        parts: gets the leading arguments of the function out of a model.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        first, *_ = names = list(inspect.signature(function).parameters)
        own = [name for name in names if name not in names[1 : names.index("batches")]]

        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> R:
            if not args and isinstance(options.get(first), Model):
                args = (options.pop(first),)
            if not (args and isinstance(args[0], Model)):
                _refuse_modules(function, args, options)
                return function(*args, **options)
            model, *rest = args
            _check_call(function.__name__, own, rest, options)
            rest.append(options.pop("batches", None))
            options["where"] = model.where(options.get("where"))
            op = function(*parts(model), model.prepare(rest[0]), **options)
            # A bound method would be kept with what is compiled for the operator, and the model.
            prepares = type(model).prepare is not Model.prepare
            return op.prepared_by(model.prepare) if prepares else op

        return wrapped

    return decorate


def _check_call(
    name: str, own: list[str], rest: list[object], options: Mapping[str, object]
) -> None:
    """Check what follows a Model: the batches, and options of the function, `own[1:]`."""
    for option in options:
        if option not in own[1:]:
            raise unknown(f"{name}(model, batches)", option, own[1:])
    count = len(rest) + ("batches" in options)
    if count != 1:
        raise TypeError(
            f"{name}(model, batches) takes the batches after a Model and no other part of it, got "
            f"{count} arguments there"
        )


def _refuse_modules(
    function: Callable[..., object], args: tuple[object, ...], options: Mapping[str, object]
) -> None:
    """Name the adapter of a module of another framework in place of the parts of a model."""
    try:
        inspect.signature(function).bind(*args, **options)
        complete = True
    except TypeError:
        complete = False
    given = (*args, *(options.get(name) for name in ("loss", "forward", "params")))
    for value in given:
        adapter = adapter_of(value)
        if adapter is not None and not (complete and is_pytree(value)):
            raise refuse(function.__name__, value, adapter)
