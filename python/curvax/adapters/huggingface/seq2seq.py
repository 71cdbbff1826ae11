"""Encoder-decoder models, as T5, BART and Whisper."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.huggingface.batches import check_labels, mapping, places
from curvax.adapters.huggingface.examples import example_of
from curvax.adapters.huggingface.tokens import load_with_head, token_model
from curvax.adapters.huggingface.writing import written
from curvax.adapters.torch.bridge import batch_to_jax, batch_to_torch
from curvax.adapters.torch.state import preserved
from curvax.options import takes_options


@takes_options()
def seq2seq_lm(model_or_path: Any, *, example: Any = None) -> AdaptedModel:
    """An encoder-decoder language model, as T5, BART or Whisper, with its own loss.

    A batch is a mapping with `input_ids` (`input_features` for speech), `labels` (-100 for tokens
    that do not count) and, if need be, `attention_mask` and other arguments of the model. What the
    decoder reads are by default the labels, shifted as the model shifts them.

    Args:
        model_or_path: as for `causal_lm`.
        example: as for `causal_lm`.

    Returns:
        As for `causal_lm`.

    Raises:
        KeyError: a batch without labels or inputs.
        TypeError: as for `causal_lm`.
        ValueError: as for `causal_lm`.
        OSError: as for `causal_lm`.
        ImportError: as for `causal_lm`.
    """
    model, main, vocabulary = load_with_head(model_or_path, "seq2seq_lm")

    def convert(batch: Any) -> Mapping[str, Any]:
        arrays = mapping(batch, main)
        check_labels(arrays, (places(arrays, main)[0], None), vocabulary)
        if "decoder_input_ids" in arrays or "decoder_inputs_embeds" in arrays:
            return arrays
        return {**arrays, "decoder_input_ids": batch_to_jax(_shifted(model, arrays))}

    example = example_of(model, None) if example is None else example
    return token_model(model, example, convert, (False, True))


class _Read(Exception):
    """Ends a call of the model where its decoder begins."""


def _shifted(model: nn.Module, arrays: Mapping[str, Any]) -> torch.Tensor:
    """What the model's decoder reads for labels."""
    batch = batch_to_torch(arrays)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        try:
            ids: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
            return ids
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot shift labels ({error}): set the token that it "
                "names in model.config, or give decoder_input_ids in the batch"
            ) from error
    read: list[Any] = []

    def stop(part: nn.Module, args: Any, options: Any) -> None:
        read.append(options.get("input_ids", args[0] if args else None))
        raise _Read

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), preserved(model), written(model):
            model(**batch)
    except _Read:
        pass
    finally:
        hook.remove()
    if not read or read[0] is None:
        raise TypeError(
            f"{type(model).__name__} does not make what its decoder reads of the labels alone: "
            "give decoder_input_ids in the batch"
        )
    found: torch.Tensor = read[0]
    return found
