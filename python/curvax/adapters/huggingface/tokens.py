"""What models with a head for tokens have in common."""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.huggingface.batches import IGNORED, labels_of
from curvax.adapters.huggingface.extras import (
    LinearCrossEntropyWithExtra,
    SoftmaxCrossEntropyWithExtra,
)
from curvax.adapters.huggingface.loading import load
from curvax.adapters.huggingface.writing import written
from curvax.adapters.torch.bridge import batch_to_torch
from curvax.adapters.torch.module import adapt
from curvax.adapters.torch.state import preserved
from curvax.checks import shown
from curvax.losses import LinearCrossEntropy, SoftmaxCrossEntropy
from curvax.typing import Batch, LossValue, PyTree

# Of the same number by two programs of torch, in float32.
_SAME = 1e-4


def load_with_head(model_or_path: nn.Module | str | Path, kind: str) -> tuple[nn.Module, str, int]:
    """A model with a linear head for tokens, what its main input is called, and its vocabulary.

    Raises:
        TypeError: it has no such head; and as `load`.
    """
    model = load(model_or_path, kind)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # PEFT wraps a head in a layer of its own, which says as much.
    if not isinstance(getattr(head, "out_features", None), int):
        raise TypeError(
            "model must have a linear head for tokens (get_output_embeddings), as "
            f"AutoModelForCausalLM has, got {type(model).__name__} with {shown(head)}"
        )
    return model, str(model.main_input_name), head.out_features


@dataclasses.dataclass(frozen=True)
class TokenHead:
    """How the loss of a model follows from what it computes.

    Attributes:
        shifted: whether a place predicts the label of the next.
        fused: whether the logits are nothing but the (capped) product with the head.
        extra: what the model's own loss adds to the cross entropy: `"none"`; `"added"`, what is
            left where the cross entropy is zero; or `"rest"`, its difference from it.
        cap: of the logits.
    """

    shifted: bool
    fused: bool = True
    extra: str = "none"
    cap: float | None = None

    def labels(self, batch: Batch) -> PyTree:
        """Those that the places predict."""
        return labels_of(batch)[:, 1:] if self.shifted else labels_of(batch)

    def outputs(self, model: nn.Module, batch: Batch) -> PyTree:
        """What the loss takes, in the program that JAX runs."""
        with written(model, ours=True):
            return self.hidden(model, batch) if self.fused else self.whole(model, batch)

    def hidden(self, model: nn.Module, batch: Batch) -> PyTree:
        """Hidden states and head, the bias if there is one, and the extra term."""
        with _without_head(model):
            found, extra = self._called(model, batch)
        head = model.get_output_embeddings()
        bias = head.bias
        if (added := getattr(model, "final_logits_bias", None)) is not None:
            bias = added[0] if bias is None else added[0] + bias
        return (found, head.weight) + (() if bias is None else (bias,)) + extra

    def whole(self, model: nn.Module, batch: Batch) -> PyTree:
        """The logits, with the extra term if there is one."""
        logits, extra = self._called(model, batch)
        return (logits, *extra) if extra else logits

    def objective(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss, of the whole logits."""
        with written(model):
            logits, extra = self._called(model, batch)
        return self.cross_entropy(logits, batch) + (extra[0] if extra else 0)

    def cross_entropy(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of logits of the predicting places."""
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.labels(batch).flatten())

    def predicting(self, logits: torch.Tensor) -> torch.Tensor:
        """Those of the places that predict a label."""
        return logits[:, :-1] if self.shifted else logits

    def _called(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, tuple[PyTree, ...]]:
        """The logits, as the head is, of the predicting places, and the extra term."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.extra == "none":
            return self.predicting(model(**inputs).logits), ()
        if self.extra == "added":
            with _without_loss(model, []):
                outputs = model(**batch)
            return self.predicting(outputs.logits), (outputs.loss,)
        outputs = model(**batch)
        logits = self.predicting(outputs.logits)
        return logits, (outputs.loss - self.cross_entropy(logits, batch),)

    def loss(self) -> Callable[[PyTree, Batch], LossValue]:
        """The same on JAX."""
        options: dict[str, Any] = {"ignore_index": IGNORED}
        if self.fused:
            kind = LinearCrossEntropy if self.extra == "none" else LinearCrossEntropyWithExtra
            return kind(self.labels, softcap=self.cap, **options)
        plain = SoftmaxCrossEntropy if self.extra == "none" else SoftmaxCrossEntropyWithExtra
        return plain(self.labels, **options)


def token_model(
    model: nn.Module,
    example: Batch,
    convert: Callable[[Batch], PyTree],
    shifts: tuple[bool, ...],
) -> AdaptedModel:
    """A model with a head for tokens, under its own loss.

    Args:
        model: checked.
        example: a batch.
        convert: turns a batch into a mapping of arrays with labels.
        shifts: whether a place may predict the label of the next, the likeliest first.
    """
    with torch.no_grad(), preserved(model):
        head = _chosen(model, batch_to_torch(convert(example)), shifts)
    if not head.fused:
        why = "does more to its hidden states than multiply by a matrix"
        if head.extra == "rest":
            why = "has a loss that is not the cross entropy of its logits alone"
        warnings.warn(
            f"{type(model).__name__} {why}, so its logits are computed, of all tokens × vocabulary",
            stacklevel=3,
        )
    return adapt(model, head.outputs, head.objective, head.loss(), example, convert)


def _chosen(model: nn.Module, batch: Batch, shifts: tuple[bool, ...]) -> TokenHead:
    """The form in which the model's own loss is computed, by what it gives on one batch."""
    if not (batch["labels"] != IGNORED).any():
        batch = batch | {"labels": torch.zeros_like(batch["labels"])}
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    heads = [TokenHead(shifted, cap=cap) for shifted in shifts]
    with written(model):
        head = _with_own_loss(model, batch, heads)
        fused = head.extra != "rest" and _is_product(model, batch, head)
    return dataclasses.replace(head, fused=fused)


def _is_product(model: nn.Module, batch: Batch, head: TokenHead) -> bool:
    """Whether the logits are the product of hidden states and the head's matrix."""
    # By what it calls too: the low ranks of PEFT add nothing before training but have a derivative.
    if type(model.get_output_embeddings()).forward is not nn.Linear.forward:
        return False
    plain = dataclasses.replace(head, extra="none")
    logits, product = plain.whole(model, batch), _product(plain.hidden(model, batch), head.cap)
    return product.shape == logits.shape and _same(product, logits)


def _with_own_loss(model: nn.Module, batch: Batch, heads: list[TokenHead]) -> TokenHead:
    if "labels" not in inspect.signature(model.forward).parameters:
        return heads[0]
    seen: list[torch.Tensor] = []
    own = getattr(model(**batch), "loss", None)
    # Not of the same call: what a decoder reads may follow from the labels.
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    with _without_loss(model, seen):
        left = model(**batch)
    if own is None:
        return heads[0]
    if not torch.isfinite(own):
        raise FloatingPointError(
            f"the loss of {type(model).__name__} is {own.item()} on the example. Attention "
            "written as 'eager' casts the mask of a float64 model to infinite numbers in float32: "
            "there call model.set_attn_implementation('sdpa') first"
        )
    entropies = [head.cross_entropy(head.predicting(logits), batch) for head in heads]
    for extra in ("none", "added"):
        term = left.loss if extra == "added" and seen else 0
        for head, entropy in zip(heads, entropies, strict=True):
            if _same(entropy + term, own):
                return dataclasses.replace(head, extra=extra)
    if seen and not (seen[0].shape == left.logits.shape and _same(seen[0], left.logits)):
        return heads[0]  # the logits were changed after the loss: what was meant is their loss
    return dataclasses.replace(heads[0], extra="rest")


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    scale = theirs.abs().max().clamp_min(1e-30)
    return bool((ours - theirs).abs().max() <= _SAME * scale)


def _product(outputs: tuple[torch.Tensor, ...], cap: float | None) -> torch.Tensor:
    logits = nn.functional.linear(*outputs)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@contextlib.contextmanager
def _without_head(model: nn.Module) -> Iterator[None]:
    """Make the head return what it is given, and leave the logits uncapped and without bias."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    added = getattr(model, "final_logits_bias", None)
    try:
        head.forward = lambda hidden: hidden
        if cap is not None:
            config.final_logit_softcapping = None
        if added is not None:
            # Not a buffer: the attribute hides it.
            vars(model)["final_logits_bias"] = 0 * added[:, :1]
        yield
    finally:
        del head.forward
        if cap is not None:
            config.final_logit_softcapping = cap
        if added is not None:
            del vars(model)["final_logits_bias"]


@contextlib.contextmanager
def _without_loss(model: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    """Make the cross entropy within the model's own loss zero; what logits it got is kept."""
    before = vars(model).get("_loss_function")

    def nothing(logits: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        seen.append(logits)
        return 0 * logits.flatten()[0]

    try:
        vars(model)["_loss_function"] = nothing
        yield
    finally:
        if before is None:
            del vars(model)["_loss_function"]
        else:
            vars(model)["_loss_function"] = before
