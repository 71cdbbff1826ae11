"""What the adapter for transformers refuses: by name, with the remedy, and leaving it as it was."""

import contextlib
import importlib.util

import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)

from tests.adapters.tiny_models import HIDDEN, IMAGE, IMAGES, bart, llama, padded, t5, tokens  # noqa: E402

from curvax.adapters import huggingface  # noqa: E402

pytestmark = pytest.mark.frameworks


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
            (huggingface.masked_lm, bart(), "seq2seq_lm"),
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
            (torch.tensor([0, 1, 1]), ValueError, r"shape \(3, 9\), got \(3,\)"),
            (tokens(3, 9) + 101, ValueError, r"labels must be in \[0, 101\)"),
            (tokens(3, 7), ValueError, r"shape \(3, 9\), got \(3, 7\)"),
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

    def test_columns_that_are_not_numbers(self):
        module = llama()
        model = huggingface.causal_lm(module)
        for text in ("a b c", ["a b c", "d e f", "g h i"]):
            with refused(module, TypeError, r"batch\['text'\].* got str: leave out"):
                cx.hessian(model, padded("right") | {"text": text})

    def test_embedded_inputs_without_labels(self):
        module = llama()
        model = huggingface.causal_lm(module)
        with refused(module, KeyError, "must have labels"):
            cx.hessian(model, {"inputs_embeds": torch.rand(3, 9, 32)})

    def test_the_token_with_which_decoders_start(self):
        module = t5()
        del module.config.decoder_start_token_id
        with refused(module, ValueError, r"decoder_start_token_id.*in model\.config, or give"):
            huggingface.seq2seq_lm(module)

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
