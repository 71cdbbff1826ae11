"""Batches of tokenizers and image processors as arrays, with labels of the right kind."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch

from curvax.adapters.torch.bridge import batch_to_jax
from curvax.typing import Batch, PyTree

IGNORED = -100
"""The label that does not count, of all models of transformers."""


EMBEDDED = "inputs_embeds"
"""What may stand in a batch in place of `input_ids`."""


def mapping(batch: Batch, main: str) -> dict[str, PyTree]:
    """A batch as a mapping of arrays; lists of equal samples, as processors make, are stacked.

    Args:
        batch: a mapping, or an array of the main input.
        main: what the main input is called.

    Raises:
        KeyError: no main input.
        TypeError: no mapping.
        ValueError: samples of unequal shapes.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch must be a mapping with {main} and labels, got {type(batch).__name__}"
        )
    if main not in batch and not (main == "input_ids" and EMBEDDED in batch):
        raise KeyError(f"a batch must have {main}, got the keys {sorted(batch)}")
    stacked = {key: _stacked(key, value) for key, value in batch.items()}
    return dict(batch_to_jax(stacked))


def places(arrays: Mapping[str, PyTree], main: str) -> tuple[int, int]:
    """The first two lengths of a batch's main input: of tokens, the samples and their places."""
    samples, length = (arrays[main] if main in arrays else arrays[EMBEDDED]).shape[:2]
    return samples, length


def _stacked(key: str, value: object) -> PyTree:
    if not isinstance(value, (list, tuple)) or not value:
        return value
    if any(isinstance(x, str) for x in value):
        return value
    samples = [x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in value]
    shapes = sorted({x.shape for x in samples})
    if len(shapes) > 1:
        raise ValueError(
            f"the samples of {key!r} must have one shape, got {shapes[0]} and {shapes[1]}: let the "
            "tokenizer or processor pad them, and return tensors"
        )
    return np.stack(samples)


def labels_of(batch: Batch) -> PyTree:
    """The labels of a batch.

    Raises:
        KeyError: it has none.
    """
    if "labels" not in batch:
        raise KeyError(f"a batch must have labels, got the keys {sorted(batch)}")
    return batch["labels"]


def check_labels(batch: Mapping[str, PyTree], shape: tuple[int | None, ...], classes: int) -> None:
    """Refuse the labels of another head.

    Args:
        batch: of arrays.
        shape: of the labels; None for a length that is free.
        classes: how many there are.

    Raises:
        KeyError: no labels.
        TypeError: labels that are not integers.
        ValueError: labels of another shape, or beyond the classes.
    """
    labels = labels_of(batch)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, the indices of classes, got {labels.dtype} of shape "
            f"{labels.shape}: for other targets use adapters.torch.from_module with a loss"
        )
    fits = labels.ndim == len(shape) and all(
        wanted in (None, got) for wanted, got in zip(shape, labels.shape, strict=True)
    )
    if not fits:
        words = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"labels must have the shape ({words}{',' if len(shape) == 1 else ''}), got "
            f"{labels.shape}: are they of another head?"
        )
    counted = np.asarray(labels)[np.asarray(labels) != IGNORED]
    if counted.size and not 0 <= counted.min() <= counted.max() < classes:
        raise ValueError(
            f"labels must be in [0, {classes}), or {IGNORED} for those that do not count, got "
            f"values from {counted.min()} to {counted.max()}"
        )
