"""The losses as functions of a model's outputs and a batch, with their own Hessian products."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from curvax.losses.checks import (
    Rows,
    chunk_rows,
    counted_rows,
    elementwise_weights,
    floating,
    head_operands,
    options_of,
)
from curvax.losses.functions import linear_cross_entropy, mse, softmax_cross_entropy
from curvax.ops.linear_ce import LinearSpec, linear_ce_total
from curvax.ops.softmax_ce.loss import Spec, softmax_ce_total
from curvax.ops.softmax_ce.options import compute_dtype


@runtime_checkable
class Loss(Protocol):
    """A loss on a model's outputs that multiplies by its own Hessian; `ggn` uses the latter."""

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """The mean, or `(mean, weight)`, as for `hessian`."""
        ...

    def hessian_product(self, outputs: Any, batch: Any, u: Any) -> Any:
        """The mean's Hessian in the outputs, times `u`, which has their structure."""
        ...


def _nothing(batch: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class _CrossEntropy:
    labels: Callable[[Any], Any]
    weights: Callable[[Any], Any] = _nothing
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "weights"):
            value = getattr(self, name)
            if not callable(value):
                raise TypeError(
                    f"{type(self).__name__}({name}=...) must be a function of the batch, got "
                    f"{type(value).__name__}; for an array pass lambda batch: the_array"
                )
        self._spec()

    def _arguments(self, batch: Any) -> dict[str, Any]:
        """Keyword arguments of the functions."""
        return {
            "labels": self.labels(batch),
            "weights": self.weights(batch),
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "return_weight": True,
        }

    def _spec(self) -> Spec:
        """Over the capped logits: the loss is convex in those."""
        options = options_of(self.softcap, self.z_loss, self.label_smoothing, self.ignore_index)
        return Spec(options, gauss_newton=True)

    def _rows(self, shape: tuple[int, ...], batch: Any, dtype: Any, of: str) -> Rows:
        options = self._spec().options
        labels, weights = self.labels(batch), self.weights(batch)
        return counted_rows(shape, labels, weights, options, dtype, may_be_empty=True, of=of)


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(_CrossEntropy):
    """`softmax_cross_entropy` of outputs that are logits `(..., V)`, with its weight.

    With a `softcap`, `hessian_product` is taken over the capped logits, which are then the outputs
    of the model: it is positive semidefinite (for `z_loss = 0`).

    Attributes:
        labels: gets the labels out of a batch.
        weights: gets the weights, or None, out of a batch.
        ignore_index: see :func:`softmax_cross_entropy`; so for what follows.
        label_smoothing: see there.
        z_loss: see there.
        softcap: see there.
    """

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """The mean over the labels counted, and their weight."""
        return softmax_cross_entropy(_logits(outputs), **self._arguments(batch))

    def hessian_product(self, outputs: Any, batch: Any, u: Any) -> Any:
        """See `Loss`; `u` has the shape of the logits."""
        z = floating("logits", _logits(outputs))
        dtype = compute_dtype(z.dtype)
        rows = self._rows(z.shape, batch, dtype, "logits")
        flat = z.astype(dtype).reshape(-1, z.shape[-1])
        tangent = jnp.asarray(u).astype(dtype).reshape(flat.shape)
        data = (rows.labels, rows.shares)
        (out,) = softmax_ce_total.hessian_product(self._spec(), (flat,), data, (tangent,))
        return out.reshape(z.shape).astype(z.dtype)


@dataclasses.dataclass(frozen=True)
class LinearCrossEntropy(_CrossEntropy):
    """`linear_cross_entropy` of outputs `(hidden, head)` or `(hidden, head, bias)`.

    `hessian_product` is the Gauss-Newton product of the head: the loss is convex in the logits,
    and `ggn` is then exactly that of the model up to its logits, which never exist.

    Attributes:
        labels: gets the labels out of a batch.
        weights: gets the weights, or None, out of a batch.
        ignore_index: see :func:`linear_cross_entropy`; so for what follows.
        label_smoothing: see there.
        z_loss: see there.
        softcap: see there.
        chunk: see there.
    """

    chunk: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        chunk_rows(self.chunk)

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """The mean over the labels counted, and their weight."""
        hidden, head, bias = _operands(outputs)
        return linear_cross_entropy(
            hidden, head, bias=bias, chunk=self.chunk, **self._arguments(batch)
        )

    def hessian_product(self, outputs: Any, batch: Any, u: Any) -> Any:
        """See `Loss`; `u` has the structure of the outputs."""
        slots = head_operands(*_operands(outputs))
        dtype = compute_dtype(jnp.result_type(*slots))
        rows = self._rows((*slots[0].shape[:-1], slots[1].shape[0]), batch, dtype, "hidden")
        flat = (slots[0].reshape(-1, slots[0].shape[-1]), *slots[1:])
        tangents = [t.reshape(s.shape).astype(s.dtype) for t, s in zip(u, flat, strict=True)]
        spec, data = LinearSpec(self._spec(), chunk_rows(self.chunk)), (rows.labels, rows.shares)
        products = linear_ce_total.hessian_product(spec, flat, data, tangents)
        return type(outputs)(p.reshape(s.shape) for p, s in zip(products, slots, strict=True))


def _logits(outputs: Any) -> Any:
    if isinstance(outputs, (tuple, list, dict)):
        raise TypeError(
            "SoftmaxCrossEntropy needs outputs that are one array of logits (..., V), got a "
            f"{type(outputs).__name__}; for (hidden, head) use LinearCrossEntropy"
        )
    return outputs


def _operands(outputs: Any) -> tuple[Any, Any, Any]:
    if not isinstance(outputs, (tuple, list)) or len(outputs) not in (2, 3):
        raise ValueError(
            "outputs must be a tuple (hidden, head) or (hidden, head, bias), got "
            f"{type(outputs).__name__}"
            + (f" of {len(outputs)}" if isinstance(outputs, (tuple, list)) else "")
        )
    hidden, head, *bias = outputs
    return hidden, head, bias[0] if bias else None


@dataclasses.dataclass(frozen=True)
class MeanSquaredError:
    """`mse` of the outputs, with its weight.

    Attributes:
        targets: gets the targets out of a batch.
        weights: gets the weights, or None, out of a batch.
    """

    targets: Callable[[Any], Any]
    weights: Callable[[Any], Any] = _nothing

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """The mean over all elements, and the sum of their weights."""
        weights = self.weights(batch)
        return mse(outputs, self.targets(batch), weights=weights, return_weight=True)

    def hessian_product(self, outputs: Any, batch: Any, u: Any) -> Any:
        """See `Loss`; `u` has the shape of the outputs."""
        x = floating("outputs", outputs)
        dtype = compute_dtype(x.dtype)
        w: Array = elementwise_weights(x, self.weights(batch), dtype)
        return (2 * w / jnp.sum(w) * jnp.asarray(u).astype(dtype)).astype(x.dtype)
