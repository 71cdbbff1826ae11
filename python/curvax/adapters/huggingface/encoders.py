"""Encoders, under a loss of their embeddings."""

from typing import Any, Literal

import torch
from torch import nn

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.huggingface.loading import load
from curvax.adapters.huggingface.writing import written
from curvax.adapters.torch.losses import TorchLoss, loss_on_jax
from curvax.adapters.torch.module import adapt
from curvax.checks import shown
from curvax.options import takes_options


@takes_options()
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
    model = load(model_or_path, "encoder")

    def targets(batch: Any) -> Any:
        return batch["targets"]

    def run(model: nn.Module, batch: Any) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "targets"}
        with written(model, ours=True):
            hidden = model(**inputs).last_hidden_state
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

    return adapt(model, run, objective, loss_on_jax(loss, targets), example, traced=objective)
