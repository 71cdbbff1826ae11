"""Batches of random numbers that a model takes, to compare it with its conversion on."""

import numpy as np
import torch
from torch import nn

_LENGTH = 16
_SIDE = 64


def tokens(model: nn.Module) -> torch.Tensor:
    """Two random sequences of words; the last of each is the end where there is a token for it."""
    config = model.config.get_text_config()
    length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
    names = ("pad", "bos", "eos", "mask")
    special = [getattr(config, f"{name}_token_id", None) for name in names]
    words = [token for token in range(config.vocab_size) if token not in special]
    ids = torch.from_numpy(np.random.default_rng(0).choice(words, (2, length)))
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        ids[:, -1] = end
    return ids


def example_of(model: nn.Module, classes: int | None) -> dict[str, torch.Tensor]:
    """A batch of the model's main input, with labels.

    Args:
        model: of transformers.
        classes: of a classifier's labels; None for labels that are tokens.

    Raises:
        ValueError: what the model takes is not known here.
    """
    main = model.main_input_name
    config = model.config
    if main == "input_ids":
        inputs = tokens(model)
    elif main == "pixel_values":
        part = getattr(config, "vision_config", config)
        size = getattr(part, "image_size", None) or _SIDE
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        inputs = _normal(model, getattr(part, "num_channels", 3), *sides)
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        inputs = _normal(model, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        raise ValueError(
            f"example must be a batch of this model's input, {main}, got none, and random ones are "
            f"made only of tokens, images and Whisper's features"
        )
    labels = tokens(model) if classes is None else torch.arange(2) % classes
    return {main: inputs, "labels": labels}


def _normal(model: nn.Module, *shape: int) -> torch.Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape))).to(dtype)
