"""Models of Keras 3 on its JAX backend, and its files (the extra `keras`).

A `.keras` or `.h5` file saved under TensorFlow or torch loads too: Keras builds the same model.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.batches import first, second
from curvax.adapters.frameworks import import_framework
from curvax.adapters.native import JaxSource, adapt
from curvax.checks import shown
from curvax.losses import MeanSquaredError, SoftmaxCrossEntropy

if "keras" not in sys.modules:
    # Keras reads it when it is imported, and can never change it.
    os.environ.setdefault("KERAS_BACKEND", "jax")
keras = import_framework("keras", "keras")


def from_model(
    model_or_path: Any,
    *,
    loss: Any = None,
    example: Any = None,
    inputs: Callable[[Any], Any] = first,
    targets: Callable[[Any], Any] = second,
) -> AdaptedModel:
    """A Keras model and its loss as a model, called with `training=False`.

    `params` is a dict of the trainable variables by their paths, as `sequential/dense/kernel`; the
    others are constants.

    Args:
        model_or_path: a built `keras.Model`, or a `.keras` or `.h5` file. Of a file no code is run:
            layers that need it are refused by Keras (`safe_mode`).
        loss: Keras's name of a loss, a `keras.losses.Loss`, or a function `loss(outputs, batch)` as
            for `curvax.ggn`; None for the loss that the model was compiled with. Mean squared
            errors and sparse categorical cross entropies of logits become the fused ones of
            `curvax.losses`.
        example: a batch to compare Keras's model with ours on, now; None to compare on the first
            batch that an operator is made of.
        inputs: gets the model's argument out of a batch.
        targets: gets out of a batch the targets of a loss of Keras.

    Returns:
        The model, with `verify(hvp=True)`.

    Raises:
        TypeError: not a Keras model.
        ValueError: a file that is no Keras model, a model that was not built, no loss, a loss that
            is not a mean, parameters that are NaN, or a model that does not compute what Keras's
            computes.
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
        model_or_path = _load(Path(model_or_path), compiled=loss is None)
    model = model_or_path
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model or a path, got {type(model).__name__}")
    if not model.built:
        raise ValueError("model must be built: call it once on a batch, or model.build(shape)")
    trainable = [variable.path for variable in model.trainable_variables]
    if len(set(trainable)) != len(trainable):
        double = sorted({path for path in trainable if trainable.count(path) > 1})
        raise ValueError(f"the model's variables must have different paths, got twice: {double}")
    others = [variable.value for variable in model.non_trainable_variables]

    def forward(params: Any, batch: Any) -> Any:
        values = [params[path] for path in trainable]
        return model.stateless_call(values, others, inputs(batch), training=False)[0]

    loss = getattr(model, "loss", None) if loss is None else loss
    ours = _loss_on_jax(loss, targets, _rank_of_outputs(model))
    source = JaxSource("Keras", lambda batch: model(inputs(batch), training=False), ours)
    if model.losses:
        warnings.warn(
            f"the model adds {len(model.losses)} losses of its own in training, as regularisers "
            "do: they are no part of the loss that is analysed",
            stacklevel=2,
        )
    params = {variable.path: variable.value for variable in model.trainable_variables}
    return adapt(source, params, forward, example)


def _load(path: Path, compiled: bool) -> Any:
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise ValueError(
            f"a Keras model must be a .keras or .h5 file, got {str(path)!r}; for weights alone see "
            "adapters.files.load"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    begins = {".keras": b"PK"}.get(path.suffix, b"\x89HDF")
    with path.open("rb") as file:
        if not file.read(4).startswith(begins):
            kind = "Keras archive" if path.suffix == ".keras" else "HDF5 file"
            raise ValueError(f"{str(path)!r} is not the {kind} that its name says")
    try:
        return keras.saving.load_model(path, safe_mode=True, compile=compiled)
    except Exception as error:
        if compiled:  # Keras cannot read its own losses from every HDF5 file
            return _load(path, compiled=False)
        raise ValueError(
            f"{str(path)!r} cannot be loaded as a Keras model ({type(error).__name__}: {error})"
        ) from error


def _rank_of_outputs(model: Any) -> int | None:
    """None for a model of several outputs, or of a class of its own, which tells no shape."""
    shape = getattr(model, "output_shape", None)
    return len(shape) if isinstance(shape, tuple) else None


def _loss_on_jax(
    loss: Any, targets: Callable[[Any], Any], rank: int | None
) -> Callable[[Any, Any], Any]:
    if loss is None:
        raise ValueError(
            "the model has no loss that it was compiled with: pass loss=, such as 'mse' or a "
            "function loss(outputs, batch)"
        )
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError as error:
            raise ValueError(
                f"loss must be Keras's name of a loss, as 'mse', a keras.losses.Loss or a function "
                f"loss(outputs, batch), got {shown(loss)}"
            ) from error
    if loss in (keras.losses.mean_squared_error, keras.losses.MeanSquaredError):
        loss = keras.losses.MeanSquaredError()
    if not isinstance(loss, keras.losses.Loss):
        return _plain(loss, targets)
    if loss.reduction not in ("sum_over_batch_size", "mean", "mean_with_sample_weight"):
        raise ValueError(
            f"loss must be a mean over the batch, got "
            f"reduction={shown(loss.reduction)}: the operators "
            "are of a mean over all batches"
        )
    if type(loss) is keras.losses.MeanSquaredError:
        return MeanSquaredError(lambda batch: _of_rank(targets(batch), rank))
    if type(loss) is keras.losses.SparseCategoricalCrossentropy:
        options = loss.get_config()
        below = None if rank is None else rank - 1

        def labels(batch: Any) -> Any:
            return _of_rank(targets(batch), below)

        ignored = options.get("ignore_class")
        if options["from_logits"]:
            return SoftmaxCrossEntropy(labels, ignore_index=-100 if ignored is None else ignored)
        if ignored is not None:  # a mean over the labels that count
            return lambda outputs, batch: (
                loss(targets(batch), outputs),
                (labels(batch) != ignored).sum(),
            )
    return lambda outputs, batch: loss(targets(batch), outputs)


def _of_rank(x: Any, rank: int | None) -> Any:
    """With a last axis of length 1 added or dropped, as Keras does for targets."""
    if rank is not None and x.ndim == rank - 1:
        return x[..., None]
    return x[..., 0] if rank is not None and x.ndim == rank + 1 and x.shape[-1] == 1 else x


def _plain(loss: Any, targets: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of Keras, of `(targets, outputs)` and per sample, or one of the user's own."""
    if getattr(loss, "__module__", "").startswith("keras."):
        return lambda outputs, batch: loss(targets(batch), outputs).mean()
    return loss
