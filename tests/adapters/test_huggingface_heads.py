"""Tiny models of transformers with experts, images, encoders and decoders, against torch."""

import contextlib
import importlib.util

import jax
import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)

from curvax.adapters import huggingface  # noqa: E402
from curvax.losses import LinearCrossEntropy, SoftmaxCrossEntropy  # noqa: E402

pytestmark = pytest.mark.frameworks

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
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
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


def checked(model, limit, batch=None):
    found = model.verify(batch, hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= limit, found
    assert found.reference == "torch's own double backward"


def own_loss(module, batch):
    with torch.no_grad():
        return float(module(**batch).loss)


def same_loss(model, module, batch, rtol=2e-6):
    np.testing.assert_allclose(
        float(cx.hessian(model, batch).loss), own_loss(module, batch), rtol=rtol
    )


EXPERTS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    module, batch = EXPERTS[name](), padded("left")
    model = huggingface.causal_lm(module, example=batch)
    checked(model, 1e-5)
    assert isinstance(model.loss, LinearCrossEntropy)
    same_loss(model, module, batch)


def test_the_terms_of_routers_are_part_of_the_loss():
    module, batch = mixtral(output_router_logits=True, router_aux_loss_coef=0.3), padded("right")
    model = huggingface.causal_lm(module, example=batch)
    checked(model, 1e-5)
    assert isinstance(model.loss, LinearCrossEntropy)
    with_routers = float(cx.hessian(model, batch).loss)
    np.testing.assert_allclose(with_routers, own_loss(module, batch), rtol=2e-6)
    module.config.output_router_logits = False
    assert own_loss(module, batch) < with_routers - 0.1


def test_products_of_a_loss_with_an_added_term_are_those_without():
    from curvax.adapters.huggingface.extras import (
        LinearCrossEntropyWithExtra,
        SoftmaxCrossEntropyWithExtra,
    )

    rng = np.random.default_rng(0)

    def labels(batch):
        return batch

    batch = jax.numpy.asarray(rng.integers(0, 5, (2, 3)))
    pairs = (
        (LinearCrossEntropy, LinearCrossEntropyWithExtra, [(2, 3, 4), (5, 4)]),
        (SoftmaxCrossEntropy, SoftmaxCrossEntropyWithExtra, [(2, 3, 5)]),
    )
    for plain, extended, shapes in pairs:
        arrays, u = (
            tuple(jax.numpy.asarray(rng.standard_normal(s), "float32") for s in shapes)
            for _ in range(2)
        )
        extra = jax.numpy.float32(0.25)
        bare = arrays if len(arrays) > 1 else arrays[0]
        bare_u = u if len(u) > 1 else u[0]
        ours, theirs = extended(labels), plain(labels)
        mean, weight = ours((*arrays, extra), batch)
        wanted, wanted_weight = theirs(bare, batch)
        np.testing.assert_allclose(mean, wanted + 0.25, rtol=1e-6)
        assert weight == wanted_weight == 6
        for found, product in (
            (
                ours.hessian_product((*arrays, extra), batch, (*u, extra)),
                theirs.hessian_product(bare, batch, bare_u),
            ),
            (
                ours.fisher_product((*arrays, extra), batch, (*u, extra), "empirical", None),
                theirs.fisher_product(bare, batch, bare_u, "empirical", None),
            ),
        ):
            parts = product if isinstance(product, tuple) else (product,)
            assert found[-1] == 0 and len(found) == len(parts) + 1
            for a, b in zip(found[:-1], parts, strict=True):
                np.testing.assert_array_equal(a, b)


def test_experts_in_double_precision():
    """For which torch has no grouped product."""
    with jax.enable_x64(True):
        module, batch = mixtral().double(), padded("left")
        model = huggingface.causal_lm(module, example=batch)
        checked(model, 1e-5)
        assert module.config._experts_implementation == mixtral().config._experts_implementation


@pytest.mark.parametrize("side", ["left", "right"])
def test_llama_in_double_precision_with_padding(side):
    with jax.enable_x64(True):
        module, batch = llama().double(), padded(side)
        assert module.config._attn_implementation == "sdpa"
        model = huggingface.causal_lm(module, example=batch)
        checked(model, 1e-5)
        same_loss(model, module, batch)


def test_batches_with_and_without_padding():
    """Of which transformers makes a mask for the first alone."""
    module, batch = llama(), padded("left", ignored=False)
    whole = {"input_ids": tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    whole["labels"] = whole["input_ids"]
    counts = [int((given["labels"][:, 1:] != -100).sum()) for given in (batch, whole)]
    model = huggingface.causal_lm(module)
    losses = [own_loss(module, given) for given in (batch, whole)]
    loss = float(cx.hessian(model, [batch, whole]).loss)
    np.testing.assert_allclose(loss, np.average(losses, weights=counts), rtol=2e-6)


def test_a_loss_that_is_nan_in_the_source_is_refused():
    """transformers' eager attention computes the softmax of a float64 mask in float32."""
    with jax.enable_x64(True):
        module, batch = llama(attn_implementation="eager").double(), padded("left")
        assert np.isnan(own_loss(module, batch))
        with pytest.raises(FloatingPointError, match=r"set_attn_implementation\('sdpa'\)"):
            huggingface.causal_lm(module, example=batch)
        module.set_attn_implementation("sdpa")
        same_loss(huggingface.causal_lm(module), module, batch)


def test_functions_that_have_a_backward_of_their_own():
    """BLOOM's GELU."""
    config = transformers.BloomConfig(vocab_size=101, hidden_size=32, n_layer=1, n_head=4)
    module, batch = transformers.BloomForCausalLM(config).eval(), padded("right")
    model = huggingface.causal_lm(module, example=batch)
    checked(model, 1e-5)
    same_loss(model, module, batch)


@pytest.mark.parametrize("version", ["Deberta", "DebertaV2"])
def test_deberta(version):
    options = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    config = getattr(transformers, f"{version}Config")(
        **options,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
        position_buckets=4,
    )
    module = getattr(transformers, f"{version}ForMaskedLM")(config).eval()
    batch = padded("right")
    model = huggingface.masked_lm(module, example=batch)
    checked(model, 1e-5)
    same_loss(model, module, batch)
    same_loss(
        model, module, {key: value[:, :7].contiguous() for key, value in padded("right").items()}
    )


IMAGE = {"image_size": 16, "num_channels": 3, "num_labels": 3}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGES = {
    "ViT": HIDDEN | {"intermediate_size": 48, "patch_size": 8},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(3)]


def processor():
    sides = {"height": 16, "width": 16}
    return transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil(size=sides)


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    config = getattr(transformers, f"{name}Config")(**IMAGES[name] | IMAGE)
    module = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    model = huggingface.image_classification(module)
    batch = processor()(pictures(), return_tensors="pt")
    assert not isinstance(batch, dict)
    batch["labels"] = torch.tensor([0, 2, 1])
    checked(model, 1e-5, batch)
    same_loss(model, module, batch)
    assert isinstance(model.loss, SoftmaxCrossEntropy)
    listed = processor()(pictures())
    assert isinstance(listed["pixel_values"], list)
    listed["labels"] = [0, 2, 1]
    a, b = (cx.hessian(model, given) for given in (batch, [listed]))
    np.testing.assert_array_equal(a.loss, b.loss)


def t5(**options):
    config = transformers.T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, **options
    )
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


SEQ2SEQ = {"t5": t5, "bart": bart, "whisper": whisper}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoders_and_decoders(name):
    module = SEQ2SEQ[name]()
    batch = padded("right") | {"labels": padded("right")["labels"][:, :7].contiguous()}
    if name == "whisper":
        batch = {"input_features": torch.randn(3, 8, 20), "labels": batch["labels"]}
    model = huggingface.seq2seq_lm(module, example=batch)
    checked(model, 1e-5)
    assert isinstance(model.loss, LinearCrossEntropy)
    assert model.forward(model.params, model.convert(batch))[0].shape == (3, 7, 32)
    same_loss(model, module, batch)
    left = padded("left")
    if name != "whisper":
        same_loss(model, module, left)
    ids = model.convert(batch)["decoder_input_ids"]
    same_loss(model, module, batch | {"decoder_input_ids": torch.tensor(np.array(ids))})


def test_the_random_example_of_an_encoder_decoder_model():
    checked(huggingface.seq2seq_lm(t5(tie_word_embeddings=False)), 1e-5)


def test_a_decoder_whose_labels_are_not_shifted():
    """As those of encoder-decoder models, alone."""
    config = transformers.BartConfig(
        vocab_size=101, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48
    )
    module, batch = transformers.BartForCausalLM(config).eval(), padded("right")
    model = huggingface.causal_lm(module, example=batch)
    same_loss(model, module, batch)


def test_a_loss_of_ones_own_is_followed():
    module, batch = llama(), padded("right")

    def smoothed(logits, labels, vocab_size, **_):
        wanted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), label_smoothing=0.2
        )

    module.loss_function = smoothed
    with pytest.warns(UserWarning, match="has a loss that is not the cross entropy"):
        model = huggingface.causal_lm(module, example=batch)
    checked(model, 1e-5)
    same_loss(model, module, batch)
    assert module.loss_function is smoothed


def state(module):
    """What must be left as it was."""
    values = module.state_dict().items()
    return (
        {name: (id(p), p.requires_grad) for name, p in module.named_parameters()},
        {name: x.tolist() for name, x in values if x.device.type == "cpu"},
        [(p.training, len(p._forward_pre_hooks), sorted(vars(p))) for p in module.modules()],
        repr(module.config),
        module.config._attn_implementation,
    )


@contextlib.contextmanager
def refused(module, error, match):
    before = state(module)
    with pytest.raises(error, match=match):
        yield
    assert state(module) == before


class TestBadInput:
    def test_models_of_another_kind(self):
        small = {"vocab_size": 101, **HIDDEN, "intermediate_size": 48}
        gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=1, n_head=4, n_embd=32, vocab_size=101)
        ).eval()
        masked = transformers.BertForMaskedLM(transformers.BertConfig(**small)).eval()
        vit = transformers.ViTForImageClassification(
            transformers.ViTConfig(**IMAGES["ViT"] | IMAGE)
        ).eval()
        for function, module, remedy in (
            (huggingface.seq2seq_lm, gpt2, "causal_lm"),
            (huggingface.causal_lm, t5(), "seq2seq_lm"),
            (huggingface.causal_lm, masked, "masked_lm"),
            (huggingface.sequence_classification, gpt2, "causal_lm"),
            (huggingface.image_classification, masked, "masked_lm"),
            (huggingface.sequence_classification, vit, "image_classification"),
        ):
            name = function.__name__
            message = rf"must be a model for {name}.*got {type(module).__name__}: use .*\.{remedy}"
            with refused(module, TypeError, message):
                function(module)

    def test_weights(self):
        module = llama()
        module.lm_head.weight = torch.nn.Parameter(
            torch.ones(101, 32, dtype=torch.int8), requires_grad=False
        )
        with refused(module, TypeError, r"'lm_head\.weight' must be float32.*int8.*dequantize"):
            huggingface.causal_lm(module)
        module = llama()
        module.is_quantized = True
        with refused(module, TypeError, r"quantised by the method 'unknown'.*dequantize"):
            huggingface.causal_lm(module)
        with torch.device("meta"):
            module = llama()
        with refused(module, ValueError, r"must be on the CPU.*meta: load its weights"):
            huggingface.causal_lm(module)
        module = llama(attention_dropout=0.1).train()
        with refused(module, ValueError, r"train mode.*module\.eval\(\)"):
            huggingface.causal_lm(module)

    def test_labels(self):
        module = llama()
        model = huggingface.causal_lm(module)
        batch = padded("right")
        for labels, error, match in (
            (torch.rand(3, 9), TypeError, r"must be integers.*float32 of shape \(3, 9\)"),
            (torch.tensor([0, 1, 1]), ValueError, r"shape \(3, any\), got \(3,\)"),
            (tokens(3, 9) + 101, ValueError, r"labels must be in \[0, 101\)"),
            (tokens(3, 7), ValueError, r"labels .* \(3, 7\)"),
        ):
            with refused(module, error, match):
                cx.hessian(model, batch | {"labels": labels})

    def test_labels_of_classifiers(self):
        config = transformers.ViTConfig(**IMAGES["ViT"] | IMAGE)
        module = transformers.ViTForImageClassification(config).eval()
        model = huggingface.image_classification(module)
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
        for labels, error, match in (
            ({}, KeyError, "must have labels"),
            ({"labels": tokens(2, 4)}, ValueError, r"shape \(2,\), got \(2, 4\)"),
            ({"labels": torch.rand(2)}, TypeError, "must be integers"),
            ({"labels": torch.tensor([0, 3])}, ValueError, r"in \[0, 3\).*from 0 to 3"),
        ):
            with refused(module, error, match):
                cx.hessian(model, batch | labels)
        with refused(module, KeyError, "must have pixel_values"):
            cx.hessian(model, {"input_ids": tokens(2, 4), "labels": tokens(2, 4)})
        with refused(module, TypeError, "must be a mapping with pixel_values and labels"):
            cx.hessian(model, torch.randn(2, 3, 16, 16))
        unequal = {"pixel_values": [np.zeros((3, 16, 16)), np.zeros((3, 8, 16))], "labels": [0, 1]}
        with refused(module, ValueError, "samples of 'pixel_values' must have one shape"):
            cx.hessian(model, unequal)
        module.config.problem_type = "multi_label_classification"
        with refused(module, ValueError, "problem_type='multi_label_classification'"):
            huggingface.image_classification(module)

    def test_loaders(self):
        module = llama()
        model = huggingface.causal_lm(module)
        with refused(module, ValueError, "at least one batch"):
            cx.hessian(model, [])

        def ends_early():
            yield padded("right")
            raise OSError("the file ends")

        with refused(module, OSError, "the file ends"):
            cx.hessian(model, ends_early())
