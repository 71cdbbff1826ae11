"""A Keras model and its loss as a model of JAX."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import keras

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.jax_libraries import (
    JaxSource,
    adapt,
    jit_value_and_grad,
    mean_of,
    noted,
    value_and_gradient,
)
from curvax.adapters.keras import losses
from curvax.adapters.keras.batches import PARTS, default_weights, inputs_of, targets_of
from curvax.adapters.keras.checks import check_model, check_state, check_steps, check_weights
from curvax.adapters.keras.network import Network
from curvax.adapters.keras.saved import load
from curvax.checks import shown
from curvax.options import takes_options


@dataclasses.dataclass(frozen=True, repr=False)
class KerasModel(AdaptedModel):
    """An `AdaptedModel` whose loss may have no mean over several batches.

    Attributes:
        pieces: knows whether it has.
    """

    pieces: losses.Pieces = dataclasses.field(kw_only=True)

    def prepare(self, batches: Any) -> Any:
        """See `AdaptedModel`."""
        prepared = super().prepare(batches)
        if isinstance(prepared, list) and len(prepared) > 1:
            self.pieces.check_several()
        return self._checked(prepared) if isinstance(prepared, Iterator) else prepared

    def _checked(self, batches: Iterator[Any]) -> Iterator[Any]:
        for position, batch in enumerate(batches):
            if position:
                self.pieces.check_several()
            yield batch


@takes_options()
def from_model(
    model_or_path: Any,
    *,
    loss: Any = None,
    class_weight: Mapping[int, float] | None = None,
    example: Any = None,
    inputs: Callable[[Any], Any] = inputs_of,
    targets: Callable[[Any], Any] = targets_of,
    sample_weights: Callable[[Any], Any] = default_weights,
) -> AdaptedModel:
    """A Keras model and its loss as a model, called with `training=False`.

    The loss is that of `evaluate`, with masks, weights, and the losses that the model and its
    layers add, as regularisers do. `params` is a dict of the trainable variables by their paths, as
    `sequential/dense/kernel`; the others are constants.

    Args:
        model_or_path: a built `keras.Model`, or a `.keras` or `.h5` file. Of a file no code is run:
            layers that need it are refused by Keras (`safe_mode`).
        loss: what `compile` takes as its loss (Keras's name of one, a `keras.losses.Loss`, a list
            or dict of them), or a function `loss(outputs, batch)` as for `curvax.ggn`; None for
            what the model was compiled with, with its `loss_weights`, or for a `compute_loss` of
            its class. Mean squared errors and sparse categorical cross entropies of logits become
            the fused ones of `curvax.losses` where nothing is weighted, masked or added.
        class_weight: as `fit` takes it; not for a function.
        example: a batch to compare Keras's model with ours on, now; None to compare on the first
            batch that an operator is made of.
        inputs: gets the model's argument out of a batch.
        targets: gets out of a batch the targets of a loss of Keras; None if there are none.
        sample_weights: gets the weights of samples out of a batch, or None; by default the third
            part of a batch `(x, y, sample_weight)`. Not for a function.

    Returns:
        The model, with `verify(hvp=True)`.

    Raises:
        TypeError: not a Keras model, or `class_weight` that is no mapping.
        ValueError: a file that is no Keras model, a model that was not built, no loss, a loss that
            is not a mean, weights that are negative or not finite, a `train_step` of the model's
            class, parameters that are NaN or not in 32 or 64 bits, or a model that does not compute
            what Keras's computes.
        RuntimeError: Keras runs on another backend.
        ImportError: keras is not installed.
    """
    if (backend := keras.backend.backend()) != "jax":
        raise RuntimeError(
            f"Keras must run on JAX, but it was imported with the backend {backend!r}: set "
            "KERAS_BACKEND=jax before Python starts. A model made under another backend is taken "
            "over by model.save('model.keras') there and from_model('model.keras') here"
        )
    if isinstance(model_or_path, (str, Path)):
        model_or_path = load(Path(model_or_path), compiled=loss is None)
    model = model_or_path
    check_model(model)
    if class_weight is not None and not isinstance(class_weight, Mapping):
        raise TypeError(
            f"class_weight must map classes to weights, as for fit, got {shown(class_weight)}"
        )
    get = _getters(inputs, targets, sample_weights, class_weight)
    if loss is not None and losses.is_own_function(loss):
        return _of_function(model, loss, get, class_weight, example)
    return _of_compiled(model, loss, get, example)


def _of_function(
    model: Any, loss: Any, get: losses.Getters, class_weight: Any, example: Any
) -> AdaptedModel:
    if class_weight is not None:
        raise ValueError(
            "class_weight is for losses of Keras, got a function as loss: weigh in the function"
        )
    if not callable(loss):
        raise TypeError(
            "loss must be what compile takes, or a function loss(outputs, batch), got "
            f"{shown(loss)}"
        )
    network = Network(model, get.inputs, masked=False, own_rule=False)

    def value(params: Any, batch: Any) -> Any:
        outputs, state, added = network.call(params, batch)
        mean = mean_of(loss(outputs, batch)) + sum(jnp.sum(one) for one in added)
        return mean, (network.forward(params, batch), state)

    pieces = losses.Pieces()
    ours = losses.own_function(network, loss, pieces)
    return _adapt(network, value, ours, pieces, example, lambda batch: None)


def _of_compiled(model: Any, loss: Any, get: losses.Getters, example: Any) -> AdaptedModel:
    own_rule = loss is None and type(model).compute_loss is not keras.Model.compute_loss
    if loss is None:
        check_steps(model)
        compiled = _compiled(model, own_rule)
    else:
        compiled = losses.Compiled(loss, None, getattr(model, "output_names", None))
    losses.check_names(compiled.loss)
    network = Network(model, get.inputs, masked=True, own_rule=own_rule)
    pieces = losses.Pieces()
    ours = losses.compiled_loss(network, compiled, get, pieces)

    def value(params: Any, batch: Any) -> Any:
        x, y, sample_weight = get.data(batch, compiled.loss is not None and not own_rule)
        with losses.compiled_with(network, compiled):
            mean, (_, _, state, _) = keras.Model.compute_loss_and_updates(
                model,
                [params[path] for path in network.params],
                network.others,
                [variable.value for variable in model.metrics_variables],
                x,
                y,
                sample_weight,
            )
        return mean, (network.forward(params, batch), state)

    return _adapt(network, value, ours, pieces, example, get.weights)


def _compiled(model: Any, own_rule: bool) -> losses.Compiled:
    container = getattr(model, "_compile_loss", None)
    if container is not None:
        return losses.Compiled(
            container._user_loss, container._user_loss_weights, container.output_names
        )
    if not (own_rule or model.compiled):
        raise ValueError(losses.NO_LOSS)
    return losses.Compiled(None, None, None)


def _adapt(
    network: Network,
    value: Callable[[Any, Any], Any],
    loss: losses.KerasLoss,
    pieces: losses.Pieces,
    example: Any,
    weights: Callable[[Any], Any],
) -> AdaptedModel:
    def evaluate(batch: Any) -> Any:
        (mean, (outputs, state)), gradient = value_and_gradient(
            "Keras", jit_value_and_grad, value, network.params, batch, PARTS
        )
        check_state(network, state)
        return (mean, outputs), gradient

    def admit(batch: Any) -> None:
        with noted(batch, PARTS):
            check_weights(weights(batch))
            pieces.whole.add(losses.count(network.inputs(batch)))

    # It normalises, and computes losses, in float32 where all else is float64.
    source = JaxSource("Keras", evaluate, bits=32)
    return adapt(
        source,
        network.params,
        network.forward,
        loss,
        example,
        kind=KerasModel,
        pieces=pieces,
        admit=admit,
    )


def _getters(
    inputs: Callable[[Any], Any],
    targets: Callable[[Any], Any],
    sample_weights: Callable[[Any], Any],
    class_weight: Mapping[int, float] | None,
) -> losses.Getters:
    def weights(batch: Any) -> Any:
        given = sample_weights(batch)
        if class_weight is None:
            return given
        if given is not None:
            raise ValueError(
                "class_weight and weights of samples exclude each other, as in Keras: pass batches "
                "(x, y), or no class_weight"
            )
        return losses.class_weights(targets(batch), class_weight)

    return losses.Getters(inputs, targets, weights)
