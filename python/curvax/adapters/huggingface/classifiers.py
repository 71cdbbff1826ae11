"""Classifiers of sequences and of images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.huggingface.batches import check_labels, labels_of, mapping, places
from curvax.adapters.huggingface.examples import example_of
from curvax.adapters.huggingface.loading import load
from curvax.adapters.huggingface.writing import written
from curvax.adapters.torch.module import adapt
from curvax.losses import SoftmaxCrossEntropy
from curvax.options import takes_options


@takes_options()
def sequence_classification(model_or_path: Any, *, example: Any = None) -> AdaptedModel:
    """A classifier of token sequences, with its cross entropy.

    A batch is a mapping with `input_ids`, integer `labels (B,)` and, if need be, `attention_mask`
    and other arguments of the model.

    Args:
        model_or_path: as for `causal_lm`.
        example: as for `causal_lm`.

    Returns:
        The model; `forward` returns the logits `(B, classes)`.

    Raises:
        KeyError: a batch without labels.
        TypeError: as for `causal_lm`, or labels that are not integers.
        ValueError: as for `causal_lm`; a head that is not a classifier's, or labels of another.
        OSError: as for `causal_lm`.
        ImportError: as for `causal_lm`.
    """
    return _classifier(load(model_or_path, "sequence_classification"), example)


@takes_options()
def image_classification(model_or_path: Any, *, example: Any = None) -> AdaptedModel:
    """A classifier of images, with its cross entropy.

    A batch is a mapping with `pixel_values (B, channels, height, width)` and integer `labels (B,)`,
    as image processors of transformers make them: tensors, arrays, or lists of one per image.

    Args:
        model_or_path: as for `causal_lm`.
        example: as for `causal_lm`; by default random pixels.

    Returns:
        The model; `forward` returns the logits `(B, classes)`.

    Raises:
        KeyError: a batch without labels or pixels.
        TypeError: as for `sequence_classification`.
        ValueError: as for `sequence_classification`.
        OSError: as for `causal_lm`.
        ImportError: as for `causal_lm`.
    """
    return _classifier(load(model_or_path, "image_classification"), example)


def _classifier(model: nn.Module, example: Any) -> AdaptedModel:
    classes = model.config.num_labels
    if classes < 2:
        raise ValueError(
            f"model must have 2 classes or more, got num_labels={classes}: for a regression use "
            "adapters.torch.from_module with a module that returns the logits"
        )
    if model.config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            "model must have one label for each sample, got "
            f"config.problem_type={model.config.problem_type!r}: use adapters.torch.from_module "
            "with a module that returns the logits, and the loss"
        )
    main = model.main_input_name

    def convert(batch: Any) -> Mapping[str, Any]:
        arrays = mapping(batch, main)
        check_labels(arrays, (places(arrays, main)[0],), classes)
        return arrays

    def run(model: nn.Module, batch: Any) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with written(model, ours=True):
            return model(**inputs).logits

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        labels = labels_of(batch)
        with written(model):
            outputs = model(**batch)
        if outputs.logits.shape != (labels.shape[0], classes):
            raise TypeError(
                f"model must return logits ({labels.shape[0]}, {classes}), as classifiers do, got "
                f"{tuple(outputs.logits.shape)} of {type(model).__name__}"
            )
        own: torch.Tensor | None = getattr(outputs, "loss", None)
        return nn.functional.cross_entropy(outputs.logits, labels) if own is None else own

    example = example_of(model, classes) if example is None else example
    return adapt(model, run, objective, SoftmaxCrossEntropy(labels_of), example, convert)
