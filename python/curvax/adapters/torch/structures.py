"""Outputs of a module: tensors in tuples, lists, dicts and objects, as pytrees of JAX."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping

import jax
import torch

from curvax.typing import PyTree


@jax.tree_util.register_pytree_node_class
class Structured:
    """An object with tensors, such as an output of transformers, as a pytree of its fields.

    A field is an attribute, and found by its name in brackets.
    """

    def __init__(
        self, kind: type, fields: Mapping[str, PyTree], static: Mapping[str, PyTree]
    ) -> None:
        self._kind = kind
        self._fields = dict(fields)
        self._static = dict(static)  # those without tensors

    def __getattr__(self, name: str) -> PyTree:
        if not name.startswith("_"):
            for fields in (self._fields, self._static):
                if name in fields:
                    return fields[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __getitem__(self, name: str) -> PyTree:
        return {**self._static, **self._fields}[name]

    def whole(self, leaf: Callable[[PyTree], PyTree]) -> PyTree:
        """The object, with `leaf` of each array."""
        fields = {name: put_together(value, leaf) for name, value in self._fields.items()}
        return self._kind(**fields, **self._static)

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], Hashable]:
        """See `jax.tree_util.register_pytree_node_class`."""
        names, static = tuple(self._fields), tuple(self._static.items())
        return tuple(self._fields.values()), (self._kind, names, static)

    @classmethod
    def tree_unflatten(
        cls,
        aux: tuple[type, tuple[str, ...], tuple[tuple[str, object], ...]],
        children: Iterable[PyTree],
    ) -> "Structured":
        """See `jax.tree_util.register_pytree_node_class`."""
        kind, names, static = aux
        return cls(kind, dict(zip(names, children, strict=True)), dict(static))


def take_apart(node: PyTree, leaf: Callable[[PyTree], PyTree]) -> PyTree:
    """Outputs as a pytree of JAX, with `leaf` of each tensor.

    Objects become `Structured`. What is neither a tensor, a number nor a container of such, as a
    cache of keys and values, is left out: None stands in its place.
    """
    if torch.is_tensor(node):
        return leaf(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        given = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
        taken = {name: take_apart(value, leaf) for name, value in given.items()}
        fields = {name: value for name, value in taken.items() if jax.tree.leaves(value)}
        static = {
            name: value if isinstance(value, str) else None
            for name, value in given.items()
            if name not in fields
        }
        return Structured(type(node), fields, static)
    if isinstance(node, Mapping):
        # JAX would sort the keys of a dict, and a loss may go through them in order.
        return OrderedDict((key, take_apart(value, leaf)) for key, value in node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(take_apart(item, leaf) for item in node))
    if isinstance(node, (tuple, list)):
        return type(node)(take_apart(item, leaf) for item in node)
    return node if isinstance(node, (int, float)) else None


def put_together(tree: PyTree, leaf: Callable[[PyTree], PyTree]) -> PyTree:
    """Outputs as the module returned them, of what `take_apart` made, with `leaf` of each array."""

    def one(node: PyTree) -> PyTree:
        return node.whole(leaf) if isinstance(node, Structured) else leaf(node)

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Structured))
