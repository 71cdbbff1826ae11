"""Keras's own reduction of losses, weights and outputs to one number."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import Array
from keras.src.backend import get_keras_mask
from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank
from keras.src.trainers.compile_utils import CompileLoss

from curvax.checks import shown
from curvax.typing import PyTree

sparse_cross_entropy = keras.losses.sparse_categorical_crossentropy
# Their targets look otherwise than their outputs.
_OF_OTHER_SHAPES = (sparse_cross_entropy, keras.losses.ctc, keras.losses.circle)


class Container(CompileLoss):  # type: ignore[misc]
    """What `compile` makes of losses, which also notes what each is a mean over.

    It has no metrics, and in float64 computes in float64, where Keras rounds to `floatx`. One
    serves one call: it takes its structure from the first.

    Attributes:
        divisors: of each loss in turn, see `_divisor`.
    """

    def __init__(self, loss: PyTree, loss_weights: PyTree, output_names: list[str] | None) -> None:
        super().__init__(loss, loss_weights, output_names=output_names)
        self.divisors: list[Array | int | None] = []
        self._found: list[Any] = []
        self._calling = False

    @property
    def metrics(self) -> list[None]:
        """None; while Keras goes through the losses, a place for each."""
        return [None] * len(self._flat_losses) if self._calling else []

    def call(self, y_true: PyTree, y_pred: PyTree, sample_weight: PyTree = None) -> PyTree:
        """See `keras.losses.Loss`."""
        names = set(y_pred) if isinstance(y_pred, dict) else set(self.output_names or ())
        if isinstance(y_true, dict) and names and not set(y_true) <= names:
            raise ValueError(
                f"the targets must have the keys of the model's outputs, {sorted(names)}, got "
                f"{sorted(y_true)}"
            )
        self._calling = True
        try:
            return super().call(y_true, y_pred, sample_weight)
        finally:
            self._calling = False

    def build(self, y_true: PyTree, y_pred: PyTree) -> None:
        """See `CompileLoss`."""
        leaves = [leaf for leaf in jax.tree.leaves(y_pred) if leaf.dtype == jnp.float64]
        if leaves:
            self._dtype = "float64"
        try:
            super().build(y_true, y_pred)
        except Exception as error:
            shapes = jax.tree.map(lambda leaf: leaf.shape, y_pred)
            raise ValueError(
                f"loss must have the structure of the outputs, {shown(shapes)}, and loss_weights "
                f"that of loss, got {shown(self._user_loss)} and {shown(self._user_loss_weights)}. "
                f"Keras says {type(error).__name__}: {error}"
            ) from error
        self._flat_losses = [
            found._replace(loss=_Counted(found.loss, self._dtype if leaves else None, self))
            for found in self._found
        ]

    def _build_nested(self, *args: object) -> None:
        super()._build_nested(*args)
        # For those that it finds there Keras would make metrics, which have variables.
        self._found += self._flat_losses
        self._flat_losses.clear()


class _Counted:
    """A loss of Keras that notes what it is a mean over."""

    def __init__(self, loss: PyTree, dtype: str | None, container: Container) -> None:
        self.loss = loss if dtype is None else copy.copy(loss)
        if dtype is not None:
            self.loss._dtype = dtype
        self.container = container

    def __call__(self, y_true: PyTree, y_pred: PyTree, sample_weight: PyTree) -> Array:
        y_true = jax.tree.map(jnp.asarray, y_true)
        _check_targets(self.loss, y_true, y_pred)
        self.container.divisors.append(_divisor(self.loss, y_true, y_pred, sample_weight))
        mean = self.loss(y_true, y_pred, sample_weight)
        if _function(self.loss) is not sparse_cross_entropy:
            return mean
        # Keras counts a label out of range as a loss of 0.
        options = _options(self.loss)
        classes = y_pred.shape[options.get("axis", -1)]
        known = (y_true >= 0) & (y_true < classes)
        if (ignored := options.get("ignore_class")) is not None:
            known |= y_true == ignored
        _check_known(y_true, known, classes, self.loss.name)
        return jnp.where(known.all(), mean, jnp.nan)


def _check_known(labels: PyTree, known: Array, classes: int, name: str) -> None:
    if not isinstance(known, jax.core.Tracer) and not known.all():
        raise ValueError(
            f"the targets of the loss {name!r} must be labels from 0 to {classes - 1}, as the "
            f"outputs have {classes} classes, got {labels[~known][0]}: are they those of another "
            "output? Labels that count nothing need the loss's ignore_class"
        )


def _function(loss: PyTree) -> Callable[..., Array] | None:
    return getattr(loss, "fn", None)


def _options(loss: PyTree) -> dict[str, Any]:
    return getattr(loss, "_fn_kwargs", {})


def _check_targets(loss: PyTree, y_true: PyTree, y_pred: PyTree) -> None:
    """Refuse targets that Keras would broadcast, or whose shape its messages do not explain."""
    function = _function(loss)
    if not getattr(function, "__module__", "").startswith("keras."):
        return
    for what, tree in (("outputs", y_pred), ("targets", y_true)):
        if not hasattr(tree, "shape"):
            raise ValueError(
                f"loss must have the structure of the outputs: the loss {loss.name!r} is of one "
                f"array, and got {what} that are a {type(tree).__name__}"
            )
    wanted, got = jnp.shape(y_pred), jnp.shape(y_true)
    if function is sparse_cross_entropy:
        axis = _options(loss).get("axis", -1) % max(len(wanted), 1)
        labels = (*wanted[:axis], *wanted[axis + 1 :])
        fits, shape = got in (labels, (*wanted[:axis], 1, *wanted[axis + 1 :])), labels
    elif function in _OF_OTHER_SHAPES:
        return
    else:
        pair = squeeze_or_expand_to_same_rank(y_true, y_pred)
        fits, shape = pair[0].shape == pair[1].shape, wanted
    if not fits:
        raise ValueError(
            f"the targets of the loss {loss.name!r} must have shape {shape}, for outputs of shape "
            f"{wanted}, got {got}: are they those of another output? Check targets= and the order "
            "or keys of the losses"
        )


def _divisor(
    loss: PyTree, y_true: PyTree, y_pred: PyTree, sample_weight: PyTree
) -> Array | int | None:
    """What a loss is a mean over.

    The number of elements, an int; by a mask or the sum of weights, an array; None if the loss
    does not say, and is taken for a mean over the samples.
    """
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        return None
    in_mask = get_keras_mask(y_pred)
    cast = [jax.tree.map(lambda x: x.astype(loss.dtype), tree) for tree in (y_true, y_pred)]
    values = loss.call(*cast)
    masks = [mask for mask in (in_mask, get_keras_mask(values)) if mask is not None]
    if values.ndim == 0:
        return None
    mask = masks[0] & masks[-1] if masks else None
    weight = None if sample_weight is None else jnp.asarray(sample_weight, loss.dtype)
    weight = apply_mask(weight, mask, values.dtype, loss.reduction)
    if weight is not None:
        values, weight = squeeze_or_expand_to_same_rank(values, weight)
        if loss.reduction == "mean_with_sample_weight":
            return weight.sum()
        values = values * weight
    return values.size if mask is None else values.size * mask.mean(dtype=values.dtype)
