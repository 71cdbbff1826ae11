"""Causal and masked language models."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.huggingface.batches import IGNORED, check_labels, mapping, places
from curvax.adapters.huggingface.examples import example_of, tokens
from curvax.adapters.huggingface.tokens import load_with_head, token_model
from curvax.adapters.torch.bridge import batch_to_jax
from curvax.options import takes_options


@takes_options()
def causal_lm(model_or_path: Any, *, example: Any = None) -> AdaptedModel:
    """A causal language model, with its own loss of the next token.

    A batch is an array of tokens `(B, T)`, or a mapping with `input_ids` and, if need be,
    `attention_mask`, `labels` and other arguments of the model; with `labels`, `inputs_embeds` may
    stand in place of `input_ids`. Labels are by default the tokens, without those that the mask
    leaves out; they are shifted as the model shifts them, and -100 does not count. What the model
    adds to its loss, as a router's term, is added here.

    Args:
        model_or_path: a model of transformers in float32 or float64, or a folder or `.gguf` file on
            this machine.
        example: a batch to compare the model with its conversion on; by default random tokens.

    Returns:
        The model; `forward` returns `(hidden, head)` or `(hidden, head, bias)`, and the added term
        after them if there is one.

    Raises:
        KeyError: a batch of `inputs_embeds` without labels.
        TypeError: see `adapters.torch.from_module`; or a model of another kind, without a head for
            tokens, or with quantised weights; labels that are not integers.
        ValueError: see there; or labels of another head.
        FloatingPointError: the model's own loss is not finite on the example.
        OSError: nothing that transformers can load at the path.
        ImportError: transformers is not installed.
    """
    model, main, vocabulary = load_with_head(model_or_path, "causal_lm")

    def convert(batch: Any) -> Any:
        arrays = _with_labels(batch, main)
        check_labels(arrays, places(arrays, main), vocabulary)
        return arrays

    # Decoders of encoder-decoder models do not shift.
    example = tokens(model) if example is None else example
    return token_model(model, example, convert, (True, False))


@takes_options()
def masked_lm(model_or_path: Any, *, example: Any = None) -> AdaptedModel:
    """A masked language model, as BERT's.

    A batch is a mapping with `input_ids`, `labels` (-100 for tokens that do not count) and, if need
    be, other arguments of the model.

    Args:
        model_or_path: as for `causal_lm`.
        example: as for `causal_lm`.

    Returns:
        As for `causal_lm`.

    Raises:
        KeyError: a batch without labels.
        TypeError: as for `causal_lm`.
        ValueError: as for `causal_lm`.
        OSError: as for `causal_lm`.
        ImportError: as for `causal_lm`.
    """
    model, main, vocabulary = load_with_head(model_or_path, "masked_lm")

    def convert(batch: Any) -> Mapping[str, Any]:
        arrays = mapping(batch, main)
        check_labels(arrays, places(arrays, main), vocabulary)
        return arrays

    example = example_of(model, None) if example is None else example
    return token_model(model, example, convert, (False,))


def _with_labels(batch: Any, main: str) -> Any:
    """A batch of arrays, with the tokens for labels if it has none."""
    if not isinstance(batch, Mapping):
        arrays = batch_to_jax(batch)
        if not hasattr(arrays, "ndim") or arrays.ndim != 2:
            raise ValueError(
                "a batch must be an array of tokens (B, T) or a mapping with input_ids, got "
                f"{type(batch).__name__} of shape {getattr(arrays, 'shape', None)}"
            )
        batch = {main: arrays}
    arrays = mapping(batch, main)
    if "labels" in arrays or main not in arrays:
        return arrays
    ids = arrays[main]
    kept = arrays.get("attention_mask", jnp.ones_like(ids)) != 0
    return {**arrays, "labels": jnp.where(kept, ids, jnp.asarray(IGNORED, ids.dtype))}
