"""Models of Hugging Face transformers (the extra `huggingface`).

Language models hand hidden states and head to `losses.LinearCrossEntropy`, so that no array of
tokens × vocabulary exists.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.frameworks import import_framework
from curvax.adapters.torch.bridge import batch_to_jax
from curvax.adapters.torch.checks import check_module
from curvax.adapters.torch.losses import TorchLoss, loss_on_jax
from curvax.adapters.torch.module import adapt
from curvax.adapters.verification import VerificationError
from curvax.checks import shown
from curvax.losses import LinearCrossEntropy, SoftmaxCrossEntropy

import_framework("transformers", "huggingface")

IGNORED = -100
"""The label that does not count, of all models of transformers."""


def causal_lm(model_or_path: Any, *, example: Any = None) -> AdaptedModel:
    """A causal language model, with its loss of the next token.

    A batch is an array of tokens `(B, T)`, or a mapping with `input_ids` and, if need be,
    `attention_mask`, `labels` and other arguments of the model. Labels are by default the tokens,
    without those that the mask leaves out; they are shifted here, and -100 does not count.

    Args:
        model_or_path: a model of transformers in float32 or float64, or a folder or `.gguf` file on
            this machine.
        example: a batch to compare the model with its conversion on; by default random tokens.

    Returns:
        The model; `forward` returns `(hidden, head)` or `(hidden, head, bias)`.

    Raises:
        TypeError: see `adapters.torch.from_module`; or a model without a head for tokens.
        ValueError: see there.
        OSError: nothing that transformers can load at the path.
        ImportError: transformers is not installed.
    """
    model = _load(model_or_path, "AutoModelForCausalLM")

    def labels(batch: Any) -> Any:
        return batch["labels"][:, 1:]

    return _language_model(model, example, labels, slice(-1), use_cache=False)


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
    model = _load(model_or_path, "AutoModelForMaskedLM")
    if example is None:
        example = {"input_ids": _tokens(model), "labels": _tokens(model)}
    return _language_model(model, example, _own_labels, slice(None))


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
        TypeError: as for `causal_lm`.
        ValueError: as for `causal_lm`; or a head that is not a classifier's.
        OSError: as for `causal_lm`.
        ImportError: as for `causal_lm`.
    """
    model = _load(model_or_path, "AutoModelForSequenceClassification")
    classes = model.config.num_labels
    if classes < 2:
        raise ValueError(
            f"model must have 2 classes or more, got num_labels={classes}: for a regression use "
            "adapters.torch.from_module with a module that returns the logits"
        )
    if example is None:
        example = {"input_ids": _tokens(model), "labels": torch.arange(2) % classes}

    def run(model: nn.Module, batch: Any) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return _called(model, inputs).logits

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(run(model, batch), _own_labels(batch))

    loss = SoftmaxCrossEntropy(labels=_own_labels)
    return adapt(model, run, objective, loss, example)


def encoder(
    model_or_path: Any,
    *,
    loss: TorchLoss,
    pooling: Literal["mean", "first", "none"] = "mean",
    example: Any = None,
) -> AdaptedModel:
    """An encoder, as BERT's or of sentence embeddings, under a loss of its embeddings.

    A batch is a mapping with `input_ids`, `targets` and, if need be, `attention_mask` and other
    arguments of the model.

    Args:
        model_or_path: as for `causal_lm`.
        loss: `loss(embeddings, targets)` on torch tensors, a mean over the batch.
        pooling: what the embeddings are: the mean of the last hidden states over the tokens that
            `attention_mask` keeps or the first token's, `(B, D)`, or all, `(B, T, D)`.
        example: a batch to compare the model with its conversion on, now; None to compare on the
            first batch that an operator is made of.

    Returns:
        The model; `forward` returns the embeddings.

    Raises:
        KeyError: a batch without targets.
        TypeError: as for `causal_lm`.
        ValueError: as for `causal_lm`; or an unknown pooling.
        OSError: as for `causal_lm`.
        ImportError: as for `causal_lm`.
    """
    if pooling not in ("mean", "first", "none"):
        raise ValueError(f"pooling must be 'mean', 'first' or 'none', got {shown(pooling)}")
    model = _load(model_or_path, "AutoModel")

    def targets(batch: Any) -> Any:
        return batch["targets"]

    def run(model: nn.Module, batch: Any) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "targets"}
        hidden = _called(model, inputs).last_hidden_state
        if pooling == "none":
            return hidden
        if pooling == "first":
            return hidden[:, 0]
        if "attention_mask" not in inputs:
            return hidden.mean(1)
        kept = inputs["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1)

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(run(model, batch), targets(batch))

    return adapt(model, run, objective, loss_on_jax(loss, targets), example)


def _load(model_or_path: Any, kind: str) -> nn.Module:
    if not isinstance(model_or_path, (str, Path)):
        check_module(model_or_path)
        if not hasattr(model_or_path, "config"):
            raise TypeError(
                "model_or_path must be a model of transformers or a path, got "
                f"{type(model_or_path).__name__}; for other modules use adapters.torch.from_module"
            )
        return model_or_path
    path = Path(model_or_path)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        options["gguf_file"] = path.name
        path = path.parent
    transformers = import_framework("transformers", "huggingface")
    # Only from this machine: an analysis must not depend on what a server sends today.
    try:
        model: nn.Module = getattr(transformers, kind).from_pretrained(
            str(path) if path.exists() else str(model_or_path),
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            **options,
        )
    except (OSError, ValueError) as error:
        raise OSError(
            "model_or_path must be a model, its folder or its .gguf file on this machine, or a "
            f"name in the cache of transformers (nothing is downloaded), got "
            f"{shown(model_or_path)}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from error
    check_module(model.eval())
    return model


def _language_model(
    model: nn.Module, example: Any, labels: Callable[[Any], Any], predicting: slice, **options: Any
) -> AdaptedModel:
    """The model of a language model: labels of the places `predicting` of its hidden states."""
    convert = batch_to_jax if labels is _own_labels else _with_labels
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise TypeError(
            "model must have a linear head for tokens (get_output_embeddings), as "
            f"AutoModelForCausalLM has, got {type(model).__name__} with {shown(head)}"
        )
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    example = _tokens(model) if example is None else example

    def hidden_and_head(model: nn.Module, batch: Any) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with _without_head(model):
            hidden = _called(model, {**inputs, **options}).logits[:, predicting]
        own = model.get_output_embeddings()
        return (hidden, own.weight) if own.bias is None else (hidden, own.weight, own.bias)

    def logits(model: nn.Module, batch: Any) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return _called(model, {**inputs, **options}).logits[:, predicting]

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        z = logits(model, batch)
        return nn.functional.cross_entropy(z.flatten(0, 1), labels(batch).flatten())

    fused = LinearCrossEntropy(labels, softcap=cap, ignore_index=IGNORED)
    try:
        return adapt(model, hidden_and_head, objective, fused, example, convert)
    except VerificationError as error:
        plain = SoftmaxCrossEntropy(labels, ignore_index=IGNORED)
        adapted = adapt(model, logits, objective, plain, example, convert)
        warnings.warn(
            f"{type(model).__name__} does more to its hidden states than multiply by its head, so "
            f"its logits are computed, of all tokens × vocabulary: {error}",
            stacklevel=3,
        )
        return adapted


def _called(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The outputs of a model, with attention that can be differentiated twice."""
    config = model.config
    chosen = config._attn_implementation
    try:
        config._attn_implementation = "eager"
        return model(**inputs)
    finally:
        config._attn_implementation = chosen


@contextlib.contextmanager
def _without_head(model: nn.Module) -> Iterator[None]:
    """Make the head return what it is given, and leave the logits uncapped."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    try:
        head.forward = lambda hidden: hidden
        if cap is not None:
            config.final_logit_softcapping = None
        yield
    finally:
        del head.forward
        if cap is not None:
            config.final_logit_softcapping = cap


def _own_labels(batch: Any) -> Any:
    if "labels" not in batch:
        raise KeyError(f"a batch must have labels, got the keys {sorted(batch)}")
    return batch["labels"]


def _with_labels(batch: Any) -> Any:
    """A batch of arrays, with the tokens for labels if it has none."""
    arrays = batch_to_jax(batch)
    if not isinstance(arrays, Mapping):
        if not hasattr(arrays, "ndim") or arrays.ndim != 2:
            raise ValueError(
                "a batch must be an array of tokens (B, T) or a mapping with input_ids, got "
                f"{type(batch).__name__} of shape {getattr(arrays, 'shape', None)}"
            )
        arrays = {"input_ids": arrays}
    if "input_ids" not in arrays:
        raise KeyError(f"a batch must have input_ids, got the keys {sorted(arrays)}")
    if "labels" in arrays:
        return arrays
    ids = arrays["input_ids"]
    kept = arrays.get("attention_mask", jnp.ones_like(ids)) != 0
    return {**arrays, "labels": jnp.where(kept, ids, jnp.asarray(IGNORED, ids.dtype))}


def _tokens(model: nn.Module) -> torch.Tensor:
    """Two random sequences."""
    config = model.config.get_text_config()
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    return torch.from_numpy(ids)
