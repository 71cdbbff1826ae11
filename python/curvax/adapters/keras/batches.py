"""The parts of a batch as Keras takes it: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import keras

from curvax.checks import cut


def inputs_of(batch: Any) -> Any:
    """What the model is called on."""
    return _parts(batch)[0]


def targets_of(batch: Any) -> Any:
    """The targets, or None."""
    return _parts(batch)[1]


def default_weights(batch: Any) -> Any:
    """The weights of samples, or None."""
    known = isinstance(batch, (tuple, list)) and len(batch) == 3
    return batch[2] if known else None


def _parts(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and not 1 <= len(batch) <= 3:
        raise TypeError(
            "a batch must be x, (x,), (x, y) or (x, y, sample_weight), as for Keras, got a "
            f"{type(batch).__name__} of {len(batch)}: say by inputs=, targets= and "
            "sample_weights= what its parts are"
        )
    return keras.utils.unpack_x_y_sample_weight(batch)


@contextlib.contextmanager
def noted(batch: Any) -> Iterator[None]:
    """Add to an error what the batch looks like, and what gets its parts."""
    try:
        yield
    except Exception as error:
        looks = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", batch)
        error.add_note(
            f"The batch is {cut(str(looks))}. A batch is (x, y) or (x, y, sample_weight), with "
            "structures that the model and its losses take; else say by inputs=, targets= and "
            "sample_weights= what its parts are"
        )
        raise
