"""Models of transformers, given or loaded, and refused where they cannot be analysed."""

from pathlib import Path

import torch
from torch import nn

from curvax.adapters.frameworks import import_framework
from curvax.adapters.torch.checks import check_module
from curvax.checks import shown

# The mappings of transformers that name the classes of each function's models.
_MAPPINGS = {
    "causal_lm": ("CAUSAL_LM",),
    "masked_lm": ("MASKED_LM",),
    "seq2seq_lm": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "sequence_classification": ("SEQUENCE_CLASSIFICATION",),
    "image_classification": ("IMAGE_CLASSIFICATION",),
}
_AUTO = {
    "causal_lm": ("AutoModelForCausalLM",),
    "masked_lm": ("AutoModelForMaskedLM",),
    "seq2seq_lm": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "sequence_classification": ("AutoModelForSequenceClassification",),
    "image_classification": ("AutoModelForImageClassification",),
    "encoder": ("AutoModel",),
}


def load(model_or_path: nn.Module | str | Path, kind: str) -> nn.Module:
    """The model that was given, or that is at a path on this machine.

    Args:
        model_or_path: as for `causal_lm`.
        kind: the function of this adapter that it is for.

    Raises:
        TypeError: see `check_module`; or no model of transformers, one of another kind, or
            quantised weights.
        ValueError: see there.
        OSError: nothing that transformers can load at the path.
    """
    if not isinstance(model_or_path, (str, Path)):
        model = model_or_path
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(
                "model_or_path must be a model of transformers or a path, got "
                f"{type(model).__name__}; for other modules use adapters.torch.from_module"
            )
    else:
        model = _loaded(model_or_path, kind).eval()
    _check_kind(model, kind)
    _check_weights(model)
    check_module(model)
    return model


def _loaded(model_or_path: nn.Module | str | Path, kind: str) -> nn.Module:
    path = Path(model_or_path)
    options: dict[str, object] = {}
    if path.suffix == ".gguf":
        options["gguf_file"] = path.name
        path = path.parent
    transformers = import_framework("transformers", "huggingface")
    errors = []
    # Only from this machine: an analysis must not depend on what a server sends today.
    for auto in _AUTO[kind]:
        try:
            model: nn.Module = getattr(transformers, auto).from_pretrained(
                str(path) if path.exists() else str(model_or_path),
                local_files_only=True,
                dtype=torch.float32,
                **options,
            )
            return model
        except (OSError, ValueError) as error:
            errors.append(error)
    raise OSError(
        "model_or_path must be a model, its folder or its .gguf file on this machine, or a "
        f"name in the cache of transformers (nothing is downloaded), got "
        f"{shown(model_or_path)}: "
        f"{str(errors[0]).strip().partition(chr(10))[0]}"
    ) from errors[0]


def _check_kind(model: nn.Module, kind: str) -> None:
    """Refuse a model that transformers has for another head."""
    kinds = [name for name in _MAPPINGS if _is_of(model, name)]
    if model.config.is_encoder_decoder and "seq2seq_lm" in kinds:  # BART has a masked loss too
        kinds = ["seq2seq_lm"]
    if kind in _MAPPINGS and kinds and kind not in kinds:
        raise TypeError(
            f"model_or_path must be a model for {kind}, as {_AUTO[kind][0]} loads, got "
            f"{type(model).__name__}: use adapters.huggingface.{kinds[0]}"
        )


def _is_of(model: nn.Module, kind: str) -> bool:
    auto = import_framework("transformers", "huggingface").models.auto.modeling_auto
    names: set[str] = set()
    for mapping in _MAPPINGS[kind]:
        for classes in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            names |= {classes} if isinstance(classes, str) else set(classes)
    return any(base.__name__ in names for base in type(model).__mro__)


def _check_weights(model: nn.Module) -> None:
    remedy = "load the model without quantization_config, or call model.dequantize() first"
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    method = str(getattr(settings, "quant_method", "unknown")).rpartition(".")[2].lower()
    # A .gguf file is dequantised as it is loaded.
    if getattr(model, "is_quantized", False) and method != "gguf":
        raise TypeError(
            "model_or_path must have weights in float32 or float64, got weights quantised by the "
            f"method {method!r}, which have no derivatives: {remedy}"
        )
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise TypeError(
                f"parameter {name!r} must be float32 or float64, got {parameter.dtype}, as of "
                f"quantised weights, which have no derivatives: {remedy}"
            )
