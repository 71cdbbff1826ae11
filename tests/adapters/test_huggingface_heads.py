"""Tiny models of transformers with experts, images, encoders and decoders, against torch."""

import importlib.util

import jax
import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)

from tests.adapters.tiny_models import (  # noqa: E402
    IMAGE,
    IMAGES,
    SIZES,
    bart,
    deepseek_v3,
    llama,
    mixtral,
    padded,
    qwen3_moe,
    t5,
    tokens,
    whisper,
)

from curvax.adapters import huggingface  # noqa: E402
from curvax.adapters.torch.bridge import batch_to_torch  # noqa: E402
from curvax.losses import LinearCrossEntropy, SoftmaxCrossEntropy  # noqa: E402

pytestmark = pytest.mark.frameworks


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
    hooks = sum(len(part._forward_hooks) for part in module.modules())
    with_routers = float(cx.hessian(model, batch).loss)
    assert sum(len(part._forward_hooks) for part in module.modules()) == hooks == 0
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


def test_a_parametrized_head_is_still_a_product():
    class Halved(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    module = llama()
    torch.nn.utils.parametrize.register_parametrization(module.lm_head, "weight", Halved())
    model = huggingface.causal_lm(module, example=padded("left"))
    assert isinstance(model.loss, LinearCrossEntropy)
    checked(model, 1e-5)


def test_embedded_inputs():
    module, batch = llama(), padded("left")
    embeds = module.get_input_embeddings()(batch.pop("input_ids")).detach()
    model = huggingface.causal_lm(module, example=batch | {"inputs_embeds": embeds})
    checked(model, 1e-5)


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
    ids = model.convert(batch)["decoder_input_ids"]
    own = batch | {"decoder_input_ids": torch.tensor(np.array(ids)).flip(0).long()}
    for other in (own, *(() if name == "whisper" else (padded("left"),))):
        with torch.no_grad():
            ours = float(model.source.objective(module, batch_to_torch(model.convert(other))))
        np.testing.assert_allclose(ours, own_loss(module, other), rtol=2e-6)


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
    found = model.verify(hvp=True)
    # Of the outputs one is what the loss is more than the cross entropy: a difference of the two.
    assert found.passed and max(found.loss, found.gradient, found.hvp) <= 1e-5, found
    same_loss(model, module, batch)
    assert module.loss_function is smoothed
