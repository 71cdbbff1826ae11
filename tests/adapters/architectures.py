"""One tiny model of each architecture of transformers, and a batch for it."""

import dataclasses

import transformers
from transformers.models.auto import configuration_auto, modeling_auto

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
