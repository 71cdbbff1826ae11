"""Cross entropies with terms that a model's own loss adds, as a router's."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from curvax.losses import LinearCrossEntropy, SoftmaxCrossEntropy
from curvax.losses.objects import FisherKind
from curvax.typing import Batch, LossValue, PyTree


class _WithExtra:
    """Outputs end with a number that is added to the mean.

    The loss is linear in that number: Gauss-Newton and Fisher matrices have nothing of it.
    """

    def __call__(self, outputs: PyTree, batch: Batch) -> LossValue:
        mean, weight = super().__call__(self._own(outputs), batch)  # type: ignore[misc]
        return mean + outputs[-1].astype(mean.dtype), weight

    def hessian_product(self, outputs: PyTree, batch: Batch, u: PyTree) -> PyTree:
        """See `Loss`."""
        product = super().hessian_product(self._own(outputs), batch, self._own(u))  # type: ignore[misc]
        return self._extended(product, outputs)

    def fisher_product(
        self, outputs: PyTree, batch: Batch, u: PyTree, kind: FisherKind, keys: Array | None
    ) -> PyTree:
        """See `Loss`."""
        own = self._own(outputs)
        product = super().fisher_product(own, batch, self._own(u), kind, keys)  # type: ignore[misc]
        return self._extended(product, outputs)

    def _own(self, outputs: PyTree) -> PyTree:
        """What the loss itself takes."""
        raise NotImplementedError

    def _extended(self, product: PyTree, outputs: PyTree) -> PyTree:
        parts = product if isinstance(product, tuple) else (product,)
        return (*parts, jnp.zeros_like(outputs[-1]))


@dataclasses.dataclass(frozen=True)
class LinearCrossEntropyWithExtra(_WithExtra, LinearCrossEntropy):
    """Of outputs `(hidden, head, extra)` or `(hidden, head, bias, extra)`."""

    def _own(self, outputs: PyTree) -> PyTree:
        return tuple(outputs[:-1])


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropyWithExtra(_WithExtra, SoftmaxCrossEntropy):
    """Of outputs `(logits, extra)`."""

    def _own(self, outputs: PyTree) -> jax.Array:
        logits: jax.Array = outputs[0]
        return logits
