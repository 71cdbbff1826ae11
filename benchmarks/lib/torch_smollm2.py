"""SmolLM2 as a transformers model with the weights of the JAX one: what PyTorch peers run on."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from curvax.models import smollm2


def model() -> nn.Module:
    """LlamaForCausalLM in float32, eager attention, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    params, config = smollm2.load()
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            intermediate_size=config.hidden,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            head_dim=config.width // config.heads,
            rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
            tie_word_embeddings=True,
            attn_implementation="eager",
            use_cache=False,
        )
    )
    made.load_state_dict(_state(params), strict=True)
    return made.eval()


def _state(params: Any) -> dict[str, torch.Tensor]:
    def tensor(x: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(x))

    layers = params["layers"]
    state = {
        "model.embed_tokens.weight": tensor(params["embed"]),
        "lm_head.weight": tensor(params["embed"]),
        "model.norm.weight": tensor(params["norm"]),
    }
    for i in range(len(layers["norm1"])):
        at = f"model.layers.{i}."
        state[at + "input_layernorm.weight"] = tensor(layers["norm1"][i])
        state[at + "post_attention_layernorm.weight"] = tensor(layers["norm2"][i])
        for name, key in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out")):
            state[f"{at}self_attn.{name}.weight"] = tensor(layers["attn"][key][i].T)
        for name in ("gate", "up", "down"):
            state[f"{at}mlp.{name}_proj.weight"] = tensor(layers["mlp"][name][i].T)
    return state


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy of `batch (B, T + 1)`."""
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
