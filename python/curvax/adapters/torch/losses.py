"""torch's losses on JAX: the ones that curvax has fused, and all others through torchax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from jax import Array
from torch import nn

from curvax.adapters.torch.bridge import to_jax
from curvax.adapters.torch.environment import environment
from curvax.adapters.torch.functional import TorchFunction, lowered
from curvax.adapters.torch.steps import StepsOfBatches
from curvax.adapters.torch.structures import put_together
from curvax.checks import shown
from curvax.losses import MeanSquaredError, SoftmaxCrossEntropy
from curvax.losses.objects import FisherKind
from curvax.typing import Batch, LossValue, PyTree

TorchLoss = Callable[[PyTree, PyTree], torch.Tensor]
"""`loss(outputs, targets)`, a scalar tensor: the mean over the batch."""


@dataclasses.dataclass(frozen=True)
class ClassesSecond:
    """The cross entropy of logits `(N, V)` or, as torch has them, `(N, V, ...)`.

    Attributes:
        last: the same of logits `(N, ..., V)`.
    """

    last: SoftmaxCrossEntropy

    def __call__(self, outputs: PyTree, batch: Batch) -> LossValue:
        """The mean over the labels counted, and their weight."""
        return self.last(_classes_last(outputs), batch)

    def hessian_product(self, outputs: PyTree, batch: Batch, u: PyTree) -> PyTree:
        """See `Loss`."""
        product = self.last.hessian_product(_classes_last(outputs), batch, _classes_last(u))
        return jnp.moveaxis(product, -1, 1)

    def fisher_product(
        self, outputs: PyTree, batch: Batch, u: PyTree, kind: FisherKind, keys: Array | None
    ) -> PyTree:
        """See `Loss`."""
        z, tangents = _classes_last(outputs), _classes_last(u)
        return jnp.moveaxis(self.last.fisher_product(z, batch, tangents, kind, keys), -1, 1)


def _classes_last(x: Array) -> Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def loss_on_jax(
    loss: Any, targets: Callable[[Batch], PyTree]
) -> Callable[[PyTree, Batch], LossValue]:
    """A torch loss as `loss(outputs, batch)` on JAX arrays.

    Args:
        loss: a module or a function of `(outputs, targets)`.
        targets: gets the targets out of a batch.

    Raises:
        TypeError: not callable.
        ValueError: a module whose `reduction` is not `"mean"`.
    """
    check_loss(loss)
    loss = _as_module(loss)
    if type(loss) is nn.MSELoss:
        return MeanSquaredError(targets)
    # With both, torch weighs the smoothed targets by class, for which there is no fused form.
    if type(loss) is nn.CrossEntropyLoss and (loss.weight is None or loss.label_smoothing == 0):
        return _cross_entropy(loss, targets)
    return _through_torchax(loss, targets)


def check_loss(loss: TorchLoss) -> None:
    """Refuse what is no mean loss.

    Raises:
        TypeError: not callable, or a class.
        ValueError: a module whose `reduction` is a sum, or none.
    """
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            "loss must be callable as loss(outputs, targets) on torch tensors, such as "
            f"torch.nn.CrossEntropyLoss(), got {shown(loss)}"
        )
    if (reduction := getattr(loss, "reduction", "mean")) not in ("mean", "batchmean"):
        raise ValueError(
            f"loss must have reduction='mean', got {reduction!r}: the operators are of a mean over "
            "all batches. Multiply the operator by the number of samples for that of the sum"
        )


def check_scalar(value: object) -> None:
    """Refuse what a loss must not return.

    Raises:
        TypeError: no tensor.
        ValueError: a tensor with more than one element.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"loss must return a torch tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(
            f"loss must return one number, the mean over the batch, got shape {tuple(value.shape)}"
        )


def weight_of(loss: Any, targets: PyTree) -> torch.Tensor | int:
    """What a mean loss divides by, on torch tensors: its weight among several batches.

    That is the length of the targets, and of `CrossEntropyLoss` and `NLLLoss` the weights of the
    labels that they count.
    """
    loss = _as_module(loss)
    if not _counts_labels(loss) or targets.is_floating_point():
        return torch.tensor(float(len(targets)))
    counted = targets != loss.ignore_index
    if loss.weight is None:
        return counted.sum()
    return (loss.weight[targets.clamp(0, len(loss.weight) - 1)] * counted).sum()


def _as_module(loss: TorchLoss) -> TorchLoss:
    """The module of a function of torch, which has the same defaults."""
    pairs = (
        (F.mse_loss, nn.MSELoss),
        (F.cross_entropy, nn.CrossEntropyLoss),
        (F.nll_loss, nn.NLLLoss),
    )
    return next((kind() for function, kind in pairs if loss is function), loss)


def _counts_labels(loss: TorchLoss) -> bool:
    return type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss)


def _cross_entropy(loss: nn.CrossEntropyLoss, targets: Callable[[Batch], PyTree]) -> ClassesSecond:
    def labels(batch: Batch) -> PyTree:
        given = jnp.asarray(targets(batch))
        if jnp.issubdtype(given.dtype, jnp.floating):
            raise TypeError(
                f"the targets of CrossEntropyLoss must be class indices, got {given.dtype} of "
                f"shape {given.shape}. For probabilities of classes pass loss=lambda outputs, "
                "targets: torch.nn.functional.cross_entropy(outputs, targets), with its weight"
            )
        return given

    options: dict[str, Any] = {
        "ignore_index": loss.ignore_index,
        "label_smoothing": loss.label_smoothing,
    }
    if loss.weight is None:
        return ClassesSecond(SoftmaxCrossEntropy(labels, **options))
    classes = to_jax(loss.weight, "the weight of the loss")

    def weights(batch: Batch) -> PyTree:
        return classes[jnp.clip(labels(batch), 0, classes.shape[0] - 1)]

    return ClassesSecond(SoftmaxCrossEntropy(labels, weights, **options))


class LossThroughTorchax:
    """A function of torch as `loss(outputs, batch)`.

    Attributes:
        steps: those that depend on a batch's values, of the module that it is the loss of.
    """

    def __init__(self, loss: TorchLoss, targets: Callable[[Batch], PyTree]) -> None:
        self._loss = loss
        self._targets = targets
        self.steps = StepsOfBatches()

    def __call__(self, outputs: PyTree, batch: Batch) -> LossValue:
        """The mean, and its weight if that is not the length of the batch."""
        env = environment()
        with lowered():
            env.call.following = self.steps.following(batch)
            value = self._loss(
                put_together(outputs, env.view), jax.tree.map(env.view, self._targets(batch))
            )
            return env.guarded(env.unview(value))


def _through_torchax(
    loss: TorchLoss, targets: Callable[[Batch], PyTree]
) -> Callable[[PyTree, Batch], LossValue]:
    if isinstance(loss, nn.Module):
        function = TorchFunction(loss, _with_weight)
        return lambda outputs, batch: function(function.params, (outputs, targets(batch)))
    return LossThroughTorchax(loss, targets)


def _with_weight(loss: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> PyTree:
    """The mean, and its weight if that is not the length of the batch."""
    value = loss(put_together(pair[0], lambda tensor: tensor), pair[1])
    return (value, weight_of(loss, pair[1])) if _counts_labels(loss) else value
