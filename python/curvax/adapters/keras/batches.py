"""The parts of a batch as Keras takes it: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`."""

import keras

from curvax.typing import Batch, PyTree

PARTS = (
    "A batch is (x, y) or (x, y, sample_weight), with the structures, keys and shapes that the "
    "model and its losses take; else say by inputs=, targets= and sample_weights= what its parts "
    "are"
)


def inputs_of(batch: Batch) -> PyTree:
    """What the model is called on."""
    return _parts(batch)[0]


def targets_of(batch: Batch) -> PyTree:
    """The targets, or None."""
    return _parts(batch)[1]


def default_weights(batch: Batch) -> PyTree:
    """The weights of samples, or None."""
    known = isinstance(batch, (tuple, list)) and len(batch) == 3
    return batch[2] if known else None


def _parts(batch: Batch) -> PyTree:
    if isinstance(batch, (tuple, list)) and not 1 <= len(batch) <= 3:
        raise TypeError(
            "a batch must be x, (x,), (x, y) or (x, y, sample_weight), as for Keras, got a "
            f"{type(batch).__name__} of {len(batch)}: say by inputs=, targets= and "
            "sample_weights= what its parts are"
        )
    return keras.utils.unpack_x_y_sample_weight(batch)
