"""The parts of a batch that is a pair."""

import numpy as np

from curvax.typing import Batch, PyTree


def first(batch: Batch) -> PyTree:
    """The inputs of a batch `(inputs, targets)`."""
    return _pair(batch)[0]


def second(batch: Batch) -> PyTree:
    """The targets of a batch `(inputs, targets)`."""
    return _pair(batch)[1]


def _pair(batch: Batch) -> PyTree:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch
    if isinstance(batch, (tuple, list)):
        got = f"a {type(batch).__name__} of {len(batch)}"
    elif isinstance(batch, dict):
        got = f"a dict with the keys {sorted(batch)}"
    else:
        got = f"{type(batch).__name__} of shape {np.shape(batch)}"
    raise TypeError(
        f"a batch must be a tuple (inputs, targets), got {got}: say by inputs= and targets= what "
        "its parts are. A list of arrays is several batches, a tuple is one"
    )
