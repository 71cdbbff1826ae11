"""The losses as functions of a model's outputs and a batch, with their own Hessian products."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self, TypeAlias, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from curvax.checks import shown
from curvax.losses.checks import (
    Rows,
    chunk_rows,
    count_samples,
    counted_rows,
    elementwise_weights,
    floating,
    head_operands,
)
from curvax.losses.functions import linear_cross_entropy, mse, softmax_cross_entropy
from curvax.losses.linear_ce import LinearSpec, linear_ce_draw, linear_ce_total
from curvax.losses.softmax_ce import Spec, draw_labels, softmax_ce_total
from curvax.ops.dtypes import compute_dtype
from curvax.ops.softmax_ce import Options

FisherKind: TypeAlias = Literal["empirical", "exact", "mc"]
_FISHER_KINDS: tuple[FisherKind, ...] = get_args(FisherKind)


def check_kind(kind: Any) -> None:
    """Refuse what is no kind of Fisher matrix.

    Raises:
        ValueError: as said.
    """
    if kind not in _FISHER_KINDS:
        raise ValueError(f"kind must be one of {_FISHER_KINDS}, got {shown(kind)}")


@runtime_checkable
class Loss(Protocol):
    """A loss on a model's outputs that multiplies by its own second derivatives.

    The classes here do; `ggn` and `fisher` take any callable. A loss of one's own may offer any of:

    - `hessian_product`, for `ggn`, in place of two derivatives by JAX;
    - `fisher_product`, for `fisher` of every kind;
    - `sample(outputs, batch, key) -> batch`, for `fisher(..., kind="mc")` without `fisher_product`:
      the batch with labels drawn from the model instead of its own. It gets one sample at a time,
      as outputs and a batch whose leading axes have length 1, and a key of `jax.random`.
    """

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """The mean, or `(mean, weight)`, as for `hessian`."""
        ...

    def hessian_product(self, outputs: Any, batch: Any, u: Any) -> Any:
        """The mean's Hessian in the outputs, times `u`, which has their structure."""
        ...

    def fisher_product(
        self, outputs: Any, batch: Any, u: Any, kind: FisherKind, keys: Array | None
    ) -> Any:
        """A Fisher matrix on the outputs, times `u`, which has their structure.

        With shares `a_t` of the labels in the mean (they sum to 1) and gradients `g_t` of the
        labels' losses in the outputs, `"empirical"` is the sum over samples of `x xᵀ`, with
        `x = Σ_t sqrt(a_t) g_t` over the sample's labels. `"mc"` is the same with labels drawn from
        the model, and `"exact"` its expectation; of these the loss is the negative log-likelihood
        alone, without penalties or smoothed targets.

        Args:
            outputs: the model's.
            batch: labels and weights; weights must not be negative or infinite.
            u: what to multiply.
            kind: the matrix.
            keys: for `"mc"`, one key of `jax.random` per sample; the labels of a sample depend on
                its own key alone. Else None.
        """
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
                    f"{name} must be a function of the batch, got {type(value).__name__}; for an "
                    "array pass lambda batch: the_array"
                )
        self._options()

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

    def _likelihood(self) -> Self:
        """What is the negative log-likelihood of the labels."""
        return dataclasses.replace(self, label_smoothing=0.0, z_loss=0.0)

    def _options(self) -> Options:
        return Options(self.softcap, self.z_loss, self.label_smoothing, self.ignore_index)

    def _spec(self) -> Spec:
        """Over the capped logits: the loss is convex in those."""
        return Spec(self._options(), gauss_newton=True)

    def _rows(self, shape: tuple[int, ...], batch: Any, dtype: Any, of: str) -> Rows:
        labels, weights = self.labels(batch), self.weights(batch)
        return counted_rows(
            shape, labels, weights, self._options(), dtype, may_be_empty=True, of=of
        )


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

    def fisher_product(
        self, outputs: Any, batch: Any, u: Any, kind: FisherKind, keys: Array | None
    ) -> Any:
        """See `Loss`; `u` has the shape of the logits."""
        check_kind(kind)
        if kind == "exact":
            return self._likelihood().hessian_product(outputs, batch, u)
        z = floating("logits", _logits(outputs))
        samples = count_samples("logits", z, 1, batch)
        dtype = compute_dtype(z.dtype)
        rows = self._rows(z.shape, batch, dtype, "logits")
        flat, labels, spec = z.astype(dtype).reshape(-1, z.shape[-1]), rows.labels, self._spec()
        if kind == "mc":
            spec = self._likelihood()._spec()
            row_keys = _keys_of_rows(keys, samples, labels.size)
            labels = draw_labels(flat, labels, row_keys, spec.options)
        data = (labels, jnp.sqrt(rows.shares))
        gradient = jax.grad(lambda flat: softmax_ce_total(spec, (flat,), data))(flat)
        return _outer_product(gradient.reshape(samples, -1), u).reshape(z.shape).astype(z.dtype)


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
        slots, flat, rows = self._flat(outputs, batch)
        return self._product(outputs, slots, flat, (rows.labels, rows.shares), u)

    def fisher_product(
        self, outputs: Any, batch: Any, u: Any, kind: FisherKind, keys: Array | None
    ) -> Any:
        """See `Loss`; `u` has the structure of the outputs. No logits of all labels exist."""
        check_kind(kind)
        if kind == "exact":
            return self._likelihood().hessian_product(outputs, batch, u)
        slots, flat, rows = self._flat(outputs, batch)
        samples = count_samples("hidden", slots[0], 1, batch)
        loss, labels = self, rows.labels
        if kind == "mc":
            loss = self._likelihood()
            row_keys = _keys_of_rows(keys, samples, labels.size)
            labels = linear_ce_draw(loss._linear_spec(), flat, (labels, rows.shares), row_keys)
        data = (labels, jnp.sqrt(rows.shares))
        return loss._product(outputs, slots, flat, data, u, samples)

    def _flat(self, outputs: Any, batch: Any) -> tuple[Any, Any, Rows]:
        """The operands as they came, with the labels in one row, and those."""
        slots = head_operands(*_operands(outputs))
        dtype = compute_dtype(jnp.result_type(*slots))
        rows = self._rows((*slots[0].shape[:-1], slots[1].shape[0]), batch, dtype, "hidden")
        return slots, (slots[0].reshape(-1, slots[0].shape[-1]), *slots[1:]), rows

    def _linear_spec(self, samples: int | None = None) -> LinearSpec:
        """As `_spec`, of products of the head."""
        return LinearSpec(self._options(), True, chunk_rows(self.chunk), samples)

    def _product(
        self, outputs: Any, slots: Any, flat: Any, data: Any, u: Any, samples: int | None = None
    ) -> Any:
        tangents = [t.reshape(s.shape).astype(s.dtype) for t, s in zip(u, flat, strict=True)]
        products = linear_ce_total.hessian_product(self._linear_spec(samples), flat, data, tangents)
        return type(outputs)(p.reshape(s.shape) for p, s in zip(products, slots, strict=True))


def _keys_of_rows(keys: Array | None, samples: int, rows: int) -> Array:
    """A key for each label, from one for each sample.

    Raises:
        ValueError: there are not as many.
    """
    if keys is None or keys.shape != (samples,):
        got = "none" if keys is None else f"shape {keys.shape}"
        raise ValueError(
            f"kind='mc' needs keys of shape ({samples},), one for each sample, got {got}"
        )
    numbers = jnp.arange(rows // samples, dtype=jnp.uint32)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold, (0, None))(keys, numbers).reshape(-1)


def _outer_product(gradients: Array, u: Any) -> Array:
    """The product of each row's outer product with itself and the same row of `u`."""
    tangents = jnp.asarray(u).astype(gradients.dtype).reshape(gradients.shape)
    # Not a sum of products: XLA:CPU would fuse it with what follows, slower, and in jaxlib 0.10.2
    # with wrong results for a block of more than 32768 elements.
    along = jnp.einsum("ij,ij->i", gradients, tangents, precision="highest")
    return gradients * along[:, None]


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
        w, total, _ = elementwise_weights(x, self.weights(batch), dtype)
        return (2 * w / total * jnp.asarray(u).astype(dtype)).astype(x.dtype)

    def fisher_product(
        self, outputs: Any, batch: Any, u: Any, kind: FisherKind, keys: Array | None
    ) -> Any:
        """See `Loss`; `u` has the shape of the outputs.

        An element's squared error is the negative log-likelihood of a normal variable of variance
        1/2, up to a constant.
        """
        check_kind(kind)
        if kind == "exact":
            return self.hessian_product(outputs, batch, u)
        x = floating("outputs", outputs)
        samples = count_samples("outputs", x, 0, batch)
        dtype = compute_dtype(x.dtype)
        w, total, _ = elementwise_weights(x, self.weights(batch), dtype)
        if kind == "mc":
            row_keys = _keys_of_rows(keys, samples, samples)
            noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], dtype))(row_keys)
            residual = jnp.sqrt(jnp.asarray(0.5, dtype)) * noise
        else:
            residual = x.astype(dtype) - jnp.asarray(self.targets(batch)).astype(dtype)
        gradients = (2 * jnp.sqrt(w / total) * residual).reshape(samples, -1)
        return _outer_product(gradients, u).reshape(x.shape).astype(x.dtype)
