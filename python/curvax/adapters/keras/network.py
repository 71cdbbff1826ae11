"""A Keras model as a function of its trainable variables, which leaves no trace in the model."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax import Array
from keras.src.backend import get_keras_mask, set_keras_mask

from curvax.typing import Batch, Params, PyTree


class Parts(NamedTuple):
    """What `forward` returns of a model whose loss needs more than its outputs.

    Attributes:
        outputs: as Keras returns them.
        masks: of each array of the outputs, 1 where it counts and 0 elsewhere; or None.
        own: the losses that the model adds for a batch, by `add_loss` or activity regularisers.
        kept: by path, the parameters that the loss itself reads, as regularisers do.
    """

    outputs: PyTree
    masks: tuple[Array | None, ...] = ()
    own: tuple[Array, ...] = ()
    kept: dict[str, Array] = {}  # noqa: RUF012


class Network:
    """A built model.

    Attributes:
        model: the user's.
        inputs: gets the model's argument out of a batch.
        params: by path, the values of the trainable variables, in Keras's order.
        others: the values of the other ones.
        regularizers: by path, of the trainable variables.
        masked: whether the loss wants the masks.
        own_rule: whether the loss is what a `compute_loss` of the model's class says.
        kept: the paths of the parameters that the loss itself reads.
    """

    def __init__(
        self, model: keras.Model, inputs: Callable[[Batch], PyTree], masked: bool, own_rule: bool
    ) -> None:
        self.model = model
        self.inputs = inputs
        # Copies: fit and evaluate give the arrays away to their programs, which delete them.
        self.params = {v.path: jnp.array(v.value) for v in model.trainable_variables}
        self.others = [jnp.array(v.value) for v in model.non_trainable_variables]
        self.regularizers = {
            variable.path: variable.regularizer
            for variable in model.trainable_variables
            if variable.regularizer is not None
        }
        self.masked = masked
        self.own_rule = own_rule
        self.kept = list(self.params) if own_rule else list(self.regularizers)

    def call(self, params: Params, batch: Batch) -> tuple[PyTree, list[Array], list[Array]]:
        """The outputs, which may have masks, the other variables, and what losses are added."""
        options = {"training": False} if self.model._call_has_training_arg else {}
        values = [params[path] for path in self.params]
        x = self.inputs(batch)
        with untouched(self.model):
            outputs, state, losses = self.model.stateless_call(
                values, self.others, x, return_losses=True, **options
            )
        return outputs, state, losses

    def forward(self, params: Params, batch: Batch) -> PyTree:
        """The outputs, or `Parts`."""
        outputs, _, losses = self.call(params, batch)
        leaves = jax.tree.leaves(outputs) if self.masked else []
        masks = [
            None if (mask := get_keras_mask(leaf)) is None else mask.astype(leaf.dtype)
            for leaf in leaves
        ]
        # Keras puts the regularisers of the variables last.
        own = losses[: len(losses) - len(self.regularizers)]
        if not (own or self.kept or any(mask is not None for mask in masks)):
            return outputs
        return Parts(
            outputs,
            tuple(masks),
            tuple(_sum(loss) for loss in own),
            {path: params[path] for path in self.kept},
        )

    def penalties(self, parts: Parts) -> list[Array]:
        """All losses that the model adds, out of what `forward` returned."""
        kept = parts.kept
        return [*parts.own, *(_sum(rule(kept[path])) for path, rule in self.regularizers.items())]


def as_parts(outputs: PyTree) -> Parts:
    """What `forward` returned as `Parts`."""
    return outputs if isinstance(outputs, Parts) else Parts(outputs)


def with_masks(parts: Parts) -> PyTree:
    """The outputs with their masks, as Keras attaches them."""
    leaves, treedef = jax.tree.flatten(parts.outputs)
    for i, mask in enumerate(parts.masks):
        if mask is not None:
            leaves[i] = jnp.array(leaves[i])  # a mask sticks to the very object
            set_keras_mask(leaves[i], mask > 0)
    return jax.tree.unflatten(treedef, leaves)


def _sum(loss: Array) -> Array:
    floating = jnp.issubdtype(loss.dtype, jnp.floating)
    return jnp.sum(loss if floating else loss.astype(keras.config.floatx()))


@contextlib.contextmanager
def untouched(model: keras.Model) -> Iterator[None]:
    """Restore the attributes of a model and its layers, and what containers among them hold.

    Keras notes losses, and layers of one's own anything, in attributes when they are called.
    Variables are no matter: a stateless scope keeps their updates to itself.
    """
    layers = model._flatten_layers()
    attributes = [(vars(layer), dict(vars(layer))) for layer in layers]
    containers = [
        (value, list(value.items()) if isinstance(value, dict) else list(value))
        for _, before in attributes
        for value in before.values()
        if isinstance(value, (list, set, dict)) and not isinstance(value, OrderedDict)
    ]
    try:
        yield
    finally:
        for live, before in attributes:
            live.clear()
            live.update(before)
        for value, content in containers:
            _restore(value, content)


def _restore(value: list[Any] | set[Any] | dict[Any, Any], content: list[Any]) -> None:
    """By the methods of the built-in types: Keras's own ones track what they are given."""
    if isinstance(value, list):
        list.__setitem__(value, slice(None), content)
    elif isinstance(value, set):
        set.clear(value)
        set.update(value, content)
    else:
        dict.clear(value)
        dict.update(value, content)
