"""One tiny model of each architecture of transformers, and a batch for it."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import transformers
from tests.adapters.tiny_models import RANKS
from transformers.models.auto import configuration_auto, modeling_auto

from curvax.adapters.huggingface.examples import example_of

HEADS = {
    "causal_lm": ("CAUSAL_LM",),
    "masked_lm": ("MASKED_LM",),
    "sequence_classification": ("SEQUENCE_CLASSIFICATION",),
    "image_classification": ("IMAGE_CLASSIFICATION",),
    "seq2seq_lm": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
}
VOCAB = 101
WIDTH = 32

# What a size is called, and how small it may be.
SIZES = {
    WIDTH: (
        "hidden_size d_model n_embd dim embed_dim hidden_dim word_embed_proj_dim embedding_size "
        "decoder_hidden_size encoder_hidden_size projection_dim lru_width attention_hidden_size "
        "cross_attention_hidden_size text_embed_dim encoder_embed_dim decoder_embed_dim"
    ),
    48: (
        "intermediate_size d_ff ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim "
        "moe_intermediate_size shared_expert_intermediate_size mlp_dim ffn_hidden_size "
        "shared_intermediate_size intermediate_size_mlp expert_ffn_hidden_size "
        "dense_ffn_hidden_size"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_decoder_layers num_encoder_layers num_key_value_heads encoder_num_hidden_layers "
        "decoder_num_hidden_layers num_experts_per_tok moe_topk moe_k num_kv_heads"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads num_local_experts "
        "decoder_attention_heads num_experts n_routed_experts encoder_num_attention_heads "
        "decoder_num_attention_heads moe_num_experts"
    ),
    8: "head_dim attention_head_size d_kv kv_channels",
    64: "max_position_embeddings n_positions max_target_positions max_seq_len n_ctx",
    VOCAB: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size n_words",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}


def architectures(kind):
    """The names of the configurations that have a head, and the class of the model."""
    found = {}
    for mapping in HEADS[kind]:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for name, classes in names.items():
            found[name] = classes if isinstance(classes, str) else classes[0]
    if kind == "masked_lm":  # BART's is for seq2seq_lm
        found = {name: c for name, c in found.items() if c.endswith(("MaskedLM", "LMHeadModel"))}
    return found


def config_class(name):
    return getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[name])


def tiny_options(cls, depth=0):
    """Arguments of a configuration, of the sizes that it has."""
    if not dataclasses.is_dataclass(cls):
        return {}
    options = {}
    for field in dataclasses.fields(cls):
        if field.name in SMALL and not isinstance(field.default, (list, tuple)):
            options[field.name] = SMALL[field.name]
        if field.name.endswith("token_id") and field.name not in options:
            value = field.default
            if isinstance(value, int) and value >= VOCAB:
                options[field.name] = value % 7
    for part, sub in (getattr(cls, "sub_configs", None) or {}).items():
        if isinstance(sub, type) and dataclasses.is_dataclass(sub) and depth < 3:
            options[part] = tiny_options(sub, depth + 1)
    return options


# What the sizes alone do not say.
DEEPSEEK = RANKS | {"first_k_dense_replace": 1}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
OPTIONS = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "resnet": STAGES | {"embedding_size": 8},
    "convnext": STAGES | {"num_stages": 2, "initializer_range": 0.1},
    "convnextv2": STAGES | {"num_stages": 2},
    "regnet": STAGES | {"embedding_size": 8, "groups_width": 8},
    "bit": STAGES | {"embedding_size": 8, "num_groups": 4},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "donut-swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "poolformer": {
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
        "num_encoder_blocks": 2,
    },
    "mobilevit": {"initializer_range": 0.1},  # else the outputs are denormal numbers
    "recurrent_gemma": {"num_hidden_layers": 3},  # one of which has attention
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen4_exp_text": {"num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25, "finegrained_output": False},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}


def tiny(kind, name, sizes=()):
    """A tiny model, in evaluation mode, of random weights.

    Args:
        kind: the function of the adapter.
        name: of the configuration.
        sizes: options that replace those found here.
    """
    cls = config_class(name)
    options = tiny_options(cls) | OPTIONS.get(name, {}) | dict(sizes)
    if kind == "causal_lm" and "is_decoder" in {field.name for field in dataclasses.fields(cls)}:
        options["is_decoder"] = True
    config = cls(**options)
    for token in ("pad_token_id", "decoder_start_token_id"):
        if not isinstance(getattr(config, token, None), int):
            setattr(config, token, 1)
    torch.manual_seed(0)
    model = getattr(transformers, architectures(kind)[name])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a router of zeros chooses between equals
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def batch_for(kind, model):
    """Three sequences with padding, and labels of which some do not count; or two images."""
    torch.manual_seed(1)
    ids = torch.randint(7, 90, (3, 10))
    kept = torch.arange(10) >= torch.tensor([[0], [3], [6]])
    if kind == "image_classification" or (
        kind == "seq2seq_lm" and model.main_input_name != "input_ids"
    ):
        return example_of(model, 2 if kind == "image_classification" else None)
    if kind != "causal_lm":
        kept = kept.flip(1)
    batch = {"input_ids": ids, "attention_mask": kept.long()}
    if kind == "sequence_classification":
        end = getattr(model.config, "eos_token_id", None)
        if isinstance(end, int) and end < VOCAB:  # what some read the sequence by
            ids[range(3), kept.sum(1) - 1] = end
        return batch | {"labels": torch.tensor([0, 1, 1])}
    labels = ids.masked_fill(~kept, -100)
    labels[0, 3] = -100
    return batch | {"labels": labels[:, :7].contiguous() if kind == "seq2seq_lm" else labels}


# Not tried: no small configuration follows from the sizes above, the class needs a package that the
# tests do not install, or its batches are not made here.
UNTRIED = set(
    """
    audioflamingo3 axk1 axk2 bailing_hybrid bamba blt canary cohere_asr cohere_compass_text
    cpmant cvt dbrx deepseek_v32 dia dinat dots1 dots3_note dots3_note_text efficientnet emu3
    encoder-decoder esmc flaubert fsmt fun_asr_nano funnel fuyu gemma3 gemma3n gemma3n_text
    gemma4 gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant glm4_moe_lite
    glm_moe_dsa glmasr got_ocr2 granite_speech granite_speech_plus granitemoehybrid hy_v4
    kimi_linear kyutai_speech_to_text layoutlmv2 lfm2_moe llama4 longcat_flash longt5 luke
    metaclip_2 modernvbert moonshine moonshine_streaming moshi moss_transcribe_diarize
    musicflamingo musicgen musicgen_melody nemo_speechlm neomme perceiver phi4_multimodal
    pop2piano qwen2_audio qwen3_5 qwen3_5_moe qwen3_asr qwen4_exp reformer roc_bert seamless_m4t
    seamless_m4t_v2 shieldgemma2 siglip2 speech-encoder-decoder speech_to_text speecht5 t5gemma2
    timm_wrapper ultravbert vibevoice vibevoice_asr voxtral voxtral_realtime xlm youtu zamba
    zamba2 zaya
    """.split()
)

# Refused, as docs/architectures.md says: by the operation that the message names, or since outputs
# or a leaf's gradient differ.
REFUSED = {
    ("causal_lm", "codegen"),
    ("causal_lm", "jetmoe"),
    ("sequence_classification", "jetmoe"),
    ("sequence_classification", "longformer"),
    ("masked_lm", "longformer"),
    ("masked_lm", "yoso"),
    ("seq2seq_lm", "led"),
    ("image_classification", "levit"),
    ("image_classification", "mobilevitv2"),
}


INTRODUCTION = """\
# Architectures of transformers

A tiny model of each, of random weights, with padding and labels that do not count: the relative
differences of its loss from transformers' own, and of gradient and Hessian-vector product from
torch's double backward. What is refused says which operation is in the way; torch can multiply by
its own double backward there. Made by the tests, as CONTRIBUTING says.
"""


def table(lines):
    """The table of docs/architectures.md, of the results in JSON lines."""
    rows = {(r["kind"], r["name"]): r for r in map(json.loads, lines)}
    yield "| head | architecture | loss | gradient | product | |"
    yield "|---|---|---|---|---|---|"
    for (kind, name), r in sorted(rows.items()):
        if "refused" in r:
            reason = r["refused"].partition(": torchax cannot run")[0].partition(", relative to")[0]
            reason = reason.partition(" (Abstract tracer")[0].replace("|", "\\|")
            yield f"| `{kind}` | {name} | | | | refused: {reason} |"
        else:
            figures = " | ".join(f"{r[key]:.0e}" for key in ("loss", "gradient", "product"))
            form = "" if r["form"] in ("LinearCrossEntropy", "SoftmaxCrossEntropy") else r["form"]
            yield f"| `{kind}` | {name} | {figures} | {form} |"
    left = {
        kind: [n for n in architectures(kind) if (kind, n) not in rows and n not in UNTRIED]
        for kind in HEADS
    }
    yield "\n## Not measured yet\n"
    yield from (f"- `{kind}`: {', '.join(sorted(names))}" for kind, names in left.items() if names)
    yield "\n## Not tried, for want of a tiny configuration or batch\n"
    yield f"{', '.join(sorted(UNTRIED))}."


if __name__ == "__main__":
    print(INTRODUCTION)
    print("\n".join(table(Path(sys.argv[1]).read_text().splitlines())))
