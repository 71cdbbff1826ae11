"""Keras's losses as functions of what `forward` returns and a batch."""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import keras
from jax import Array

from curvax.adapters.keras.container import Container, sparse_cross_entropy
from curvax.adapters.keras.network import Network, Parts, as_parts, untouched, with_masks
from curvax.checks import shown
from curvax.losses import MeanSquaredError, SoftmaxCrossEntropy
from curvax.typing import Batch, LossValue, PyTree

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")
NO_LOSS = (
    "the model has no loss that it was compiled with: pass loss=, such as 'mse' or a function "
    "loss(outputs, batch)"
)
_METHODS = ("hessian_product", "fisher_product", "sample")


class Compiled(NamedTuple):
    """A loss as `compile` takes it; `loss` is None where the model's own losses are all."""

    loss: PyTree
    weights: PyTree
    output_names: list[str] | None

    def container(self) -> Container | None:
        """One for one call."""
        return None if self.loss is None else Container(*self)


class Getters(NamedTuple):
    """What gets the parts that a loss needs out of a batch."""

    inputs: Callable[[Batch], PyTree]
    targets: Callable[[Batch], PyTree]
    weights: Callable[[Batch], PyTree]

    def data(self, batch: Batch, labelled: bool) -> tuple[PyTree, PyTree, PyTree]:
        """All three parts.

        Raises:
            ValueError: a batch without targets that must have some.
        """
        targets = self.targets(batch)
        if labelled and targets is None:
            raise ValueError(
                "a batch must have targets for this loss, as in (x, y), got none: pass batches "
                "with labels, or say by targets= what they are"
            )
        return self.inputs(batch), targets, self.weights(batch)


class KerasLoss:
    """A loss of `forward`'s outputs and a batch.

    Where another one says exactly the same in a better form, it and its methods are taken.

    Attributes:
        total: the loss.
        better: gets that other loss for outputs and a batch, or None.
        methods: names of the methods that it has.
    """

    def __init__(
        self,
        total: Callable[[PyTree, Batch], LossValue],
        better: Callable[
            [PyTree, Batch], Callable[[PyTree, Batch], LossValue] | None
        ] = lambda outputs, batch: None,
        methods: tuple[str, ...] = (),
    ) -> None:
        self.total = total
        self.better = better
        self.methods = methods

    def __call__(self, outputs: PyTree, batch: Batch) -> LossValue:
        """The mean, or `(mean, weight)`."""
        better = self.better(outputs, batch)
        return (self.total if better is None else better)(outputs, batch)

    def __getattr__(self, name: str) -> Callable[..., PyTree]:
        if name in _METHODS and name in vars(self).get("methods", ()):
            own = {"hessian_product": self._hessian_product}.get(name, self._refuse(name))

            def method(outputs: PyTree, batch: Batch, *args: object) -> PyTree:
                better = self.better(outputs, batch)
                return (own if better is None else getattr(better, name))(outputs, batch, *args)

            return method
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _hessian_product(self, outputs: PyTree, batch: Batch, u: PyTree) -> PyTree:
        def mean(outputs: PyTree) -> PyTree:
            loss = self.total(outputs, batch)
            return loss[0] if isinstance(loss, tuple) else loss

        return jax.jvp(jax.grad(mean), (outputs,), (u,))[1]

    def _refuse(self, name: str) -> Callable[..., NoReturn]:
        def refuse(*args: object) -> NoReturn:
            raise TypeError(
                "a Fisher matrix is not known of a loss with masks, weights of samples or losses "
                "that the model adds itself (add_loss, regularisers): take ggn, or pass loss=, a "
                "function loss(outputs, batch), for a model that adds none"
            )

        return refuse


class Pieces:
    """Whether a loss over pieces of the data is that of all, by a common weight of its parts.

    Several losses that are means over different numbers, as masks leave them, have none.

    Attributes:
        common: whether they have one, as far as they have been traced.
        whole: the numbers of samples of batches that users gave.
    """

    def __init__(self) -> None:
        self.common = True
        self.whole: set[int] = set()

    def check_several(self) -> None:
        """Refuse several batches.

        Raises:
            ValueError: there is no common weight.
        """
        if not self.common:
            raise ValueError(
                "batches must be one batch, in one piece, for this loss: its parts, of several "
                "outputs or losses, are means over different numbers of elements, as masks or "
                "weights leave them, so that a mean over pieces is not that of all samples. "
                "Concatenate the batches and leave out microbatch_size, or pass loss=, a function "
                "loss(outputs, batch) that returns (mean, weight)"
            )

    def divide(self, samples: int) -> None:
        """Note that there is none, and refuse a microbatch, as short as no batch."""
        self.common = False
        if self.whole and samples not in self.whole:
            self.check_several()


def own_function(
    network: Network, loss: Callable[[PyTree, Batch], LossValue], pieces: Pieces
) -> KerasLoss:
    """`loss(outputs, batch)` plus the losses that the model adds."""

    def total(outputs: PyTree, batch: Batch) -> PyTree:
        parts = as_parts(outputs)
        value = loss(parts.outputs, batch)
        mean, weight = value if isinstance(value, tuple) else (value, None)
        mean = mean + sum(network.penalties(parts))
        if parts.own and weight is not None:
            pieces.divide(count(network.inputs(batch)))
        return mean if weight is None else (mean, weight)

    def better(outputs: PyTree, batch: Batch) -> PyTree:
        return None if isinstance(outputs, Parts) else loss

    return KerasLoss(total, better, tuple(name for name in _METHODS if hasattr(loss, name)))


def compiled_loss(network: Network, compiled: Compiled, get: Getters, pieces: Pieces) -> KerasLoss:
    """What Keras's `compute_loss` returns."""

    def total(outputs: PyTree, batch: Batch) -> PyTree:
        x, y, sample_weight = get.data(batch, compiled.loss is not None and not network.own_rule)
        parts = as_parts(outputs)
        mean, container = compute_loss(network, compiled, parts, (x, y, sample_weight))
        samples = count(x)
        divisors = [] if container is None else container.divisors
        weight, common = _weight(divisors, bool(parts.own) or network.own_rule, samples)
        if not common:
            pieces.divide(samples)
        return mean, weight

    fused = _fused(compiled)

    def better(outputs: PyTree, batch: Batch) -> PyTree:
        if fused is None or isinstance(outputs, Parts) or get.weights(batch) is not None:
            return None
        return fused(outputs, get.targets(batch))

    methods = ("hessian_product", "fisher_product") if fused else ()
    return KerasLoss(total, better, methods)


def count(x: PyTree) -> int:
    """The samples of what the model is called on."""
    return int(jax.tree.leaves(x)[0].shape[0])


def compute_loss(
    network: Network, compiled: Compiled, parts: Parts, data: tuple[PyTree, PyTree, PyTree]
) -> tuple[Array, Container | None]:
    """Keras's `compute_loss` of outputs, and the container it used."""
    model, penalties = network.model, network.penalties(parts)
    x, y, sample_weight = data
    if compiled.loss is None and not network.own_rule and not penalties:
        raise ValueError(f"{NO_LOSS}. It adds none itself either")
    values = [parts.kept.get(path, value) for path, value in network.params.items()]
    with compiled_with(network, compiled) as container:
        vars(model)["_losses_override"] = penalties
        loss, _ = model.stateless_compute_loss(
            values,
            network.others,
            [variable.value for variable in model.metrics_variables],
            x=x,
            y=y,
            y_pred=with_masks(parts),
            sample_weight=sample_weight,
            training=False,
        )
    return loss, container


@contextlib.contextmanager
def compiled_with(network: Network, compiled: Compiled) -> Iterator[Container | None]:
    """The model as if compiled with other losses, until the context ends."""
    with untouched(network.model):
        container = compiled.container()
        vars(network.model)["_compile_loss"] = container
        if not network.own_rule:
            rule = types.MethodType(keras.Model.compute_loss, network.model)
            vars(network.model)["compute_loss"] = rule
        yield container


def _weight(
    divisors: list[Array | int | None], own: bool, samples: int
) -> tuple[Array | int, bool]:
    """The weight of a batch among others, and whether it is that of all parts of the loss."""
    known = [samples if divisor is None else divisor for divisor in divisors]
    known += [samples] if own else []
    if len(known) == 1:
        return known[0], True
    if not all(isinstance(divisor, int) for divisor in known):
        return samples, False
    return (known[0] if len(set(known)) == 1 else samples), True


def _fused(compiled: Compiled) -> Callable[[PyTree, Batch], LossValue] | None:
    """Gets the loss of `curvax.losses` that says the same for outputs and targets without weights.

    None where there is none at all; the function returns None for outputs or targets that do not
    look as it needs.
    """
    loss = compiled.loss
    flat = keras.tree.flatten(loss)
    if len(flat) != 1 or compiled.weights is not None:
        return None
    loss = keras.losses.get(flat[0]) if flat[0] not in ("crossentropy", "ce") else None
    function, options = getattr(loss, "fn", loss), getattr(loss, "_fn_kwargs", {})
    if function is keras.losses.mean_squared_error:
        return _squares
    if function is not sparse_cross_entropy or options.get("axis", -1) != -1:
        return None
    if not options.get("from_logits", False):
        return None
    ignored = options.get("ignore_class")
    # Keras ignores no label unless asked to: no label is this one.
    return lambda outputs, y: _labels(outputs, y, -(2**31) if ignored is None else ignored)


def _squares(outputs: PyTree, y: PyTree) -> PyTree:
    if not _is_array(outputs) or not _is_array(y):
        return None
    wanted, got = outputs.shape, y.shape
    if got == wanted or (wanted[-1:] == (1,) and got == wanted[:-1]) or got == (*wanted, 1):
        return MeanSquaredError(lambda batch: jnp.reshape(y, wanted))
    return None


def _labels(outputs: PyTree, y: PyTree, ignored: int) -> PyTree:
    if not _is_array(outputs) or not _is_array(y) or not jnp.issubdtype(y.dtype, jnp.integer):
        return None
    wanted = outputs.shape[:-1]
    if y.shape in (wanted, (*wanted, 1)):
        return SoftmaxCrossEntropy(lambda batch: jnp.reshape(y, wanted), ignore_index=ignored)
    return None


def _is_array(x: object) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def check_names(loss: PyTree) -> None:
    """Refuse what no loss of Keras is, and what is no mean.

    Raises:
        ValueError: as said.
    """
    for one in keras.tree.flatten(loss):
        if one is None or (isinstance(one, str) and one.lower() in ("crossentropy", "ce")):
            continue
        try:
            found = keras.losses.get(one)
        except ValueError as error:
            raise ValueError(
                "loss must be Keras's name of a loss, as 'mse', a keras.losses.Loss, a dict or "
                f"list of them, or a function loss(outputs, batch), got {shown(one)}"
            ) from error
        reduction = getattr(found, "reduction", "mean")
        if isinstance(found, keras.losses.Loss) and reduction not in _MEANS:
            raise ValueError(
                f"loss must be a mean over the batch, got reduction={shown(reduction)}: the "
                "operators are of a mean over all batches"
            )


def is_own_function(loss: PyTree) -> bool:
    """Whether a loss is `loss(outputs, batch)`, rather than one of Keras."""
    if isinstance(loss, (str, keras.losses.Loss, Mapping, list, tuple)) or inspect.isclass(loss):
        return False
    return not getattr(loss, "__module__", "").startswith("keras.")


def class_weights(targets: PyTree, class_weight: Mapping[int, float]) -> Array:
    """The weights of samples that `fit` makes of weights of classes.

    Raises:
        ValueError: several targets, or several labels per sample.
    """
    if not _is_array(targets):
        raise ValueError(
            "class_weight is for one output, as in Keras, got targets that are a "
            f"{type(targets).__name__}: give sample weights in its place, as a third part of the "
            "batch"
        )
    labels = jnp.asarray(targets)
    if labels.ndim > 1:
        one_hot = labels.shape[-1] != 1
        labels = jnp.argmax(labels, axis=-1) if one_hot else labels[..., 0]
    if labels.ndim != 1:
        raise ValueError(
            "class_weight needs one label per sample, as in Keras, got targets of shape "
            f"{jnp.shape(targets)}: give sample weights in its place"
        )
    rounded = jnp.round(labels).astype(jnp.int32)
    weights = jnp.ones(rounded.shape, keras.config.floatx())
    for label, weight in class_weight.items():
        weights = jnp.where(rounded == label, weight, weights)
    return weights
