"""Tiny models of transformers, and batches for them."""

import torch
import transformers

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
RANKS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = RANKS | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
}


def mixtral(**options):
    config = transformers.MixtralConfig(**SIZES | {"num_local_experts": 3} | options)
    return transformers.MixtralForCausalLM(config).eval()


def qwen3_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.Qwen3MoeConfig(**SIZES, **experts, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def deepseek_v3():
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**SIZES | LATENT)
    ).eval()


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | options)).eval()


def tokens(*shape):
    return torch.randint(1, 101, shape)


def padded(side, ignored=True):
    """Three sequences of 9, 6 and 2 tokens, and labels of which some do not count."""
    ids = tokens(3, 9)
    lengths = torch.tensor([[9], [6], [2]])
    kept = torch.arange(9) < lengths if side == "right" else torch.arange(9) >= 9 - lengths
    labels = ids.masked_fill(~kept, -100)
    if ignored:
        labels[0, 4] = -100
    return {
        "input_ids": ids.masked_fill(~kept, 0),
        "attention_mask": kept.long(),
        "labels": labels,
    }


IMAGE = {"image_size": 16, "num_channels": 3, "num_labels": 3}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGES = {
    "ViT": HIDDEN | {"intermediate_size": 48, "patch_size": 8},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}


def t5(**options):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    start = {"decoder_start_token_id": 0}
    config = transformers.T5Config(vocab_size=101, **sizes, **start | options)
    return transformers.T5ForConditionalGeneration(config).eval()


def bart():
    part = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    parts = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in part.items()}
    config = transformers.BartConfig(
        vocab_size=101, d_model=32, max_position_embeddings=64, pad_token_id=0, **parts
    )
    module = transformers.BartForConditionalGeneration(config).eval()
    module.final_logits_bias.normal_()
    return module


def whisper():
    part = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    parts = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in part.items()}
    config = transformers.WhisperConfig(
        vocab_size=101,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        **parts,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()
