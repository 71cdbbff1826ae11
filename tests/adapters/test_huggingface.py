"""Models of transformers: tiny ones of each architecture, and what they are given."""

import importlib.util

import jax
import jax.numpy as jnp
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
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=101, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def gemma2():
    """With capped logits and a sliding window."""
    config = transformers.Gemma2Config(
        **GROUPED, head_dim=8, final_logit_softcapping=3.0, sliding_window=4
    )
    return transformers.Gemma2ForCausalLM(config)


def granite():
    """Whose logits are divided by a number."""
    config = transformers.GraniteConfig(**GROUPED, logits_scaling=4.0)
    return transformers.GraniteForCausalLM(config)


def bert(kind, **options):
    config = transformers.BertConfig(**SIZES, **options)
    return getattr(transformers, kind)(config)


CAUSAL = {"gpt2": gpt2, "llama": llama, "gemma2": gemma2, "granite": granite}


def tokens(*shape):
    return torch.randint(0, 101, shape)


def checked(model, limit):
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= limit, found
    assert found.reference == "torch's own double backward"


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name):
    model = huggingface.causal_lm(CAUSAL[name]().eval())
    checked(model, 1e-5)
    assert isinstance(model.loss, LinearCrossEntropy)
    outputs = jax.eval_shape(model.forward, model.params, model.convert(tokens(3, 9)))
    assert outputs[0].shape == (3, 8, 32) and outputs[1].shape == (101, 32)


def test_in_double_precision():
    with jax.enable_x64(True):
        checked(huggingface.causal_lm(gpt2().double().eval()), 1e-10)
        checked(huggingface.masked_lm(bert("BertForMaskedLM").double().eval()), 1e-10)
        # transformers normalises in float32 here, whatever the parameters are.
        checked(huggingface.causal_lm(llama().double().eval()), 1e-5)


def test_bert_models():
    checked(huggingface.masked_lm(bert("BertForMaskedLM").eval()), 1e-5)
    classifier = bert("BertForSequenceClassification", num_labels=3).eval()
    model = huggingface.sequence_classification(classifier)
    checked(model, 1e-5)
    assert isinstance(model.loss, SoftmaxCrossEntropy)


@pytest.mark.parametrize(
    "pooling,shape", [("mean", (4, 32)), ("first", (4, 32)), ("none", (4, 7, 32))]
)
def test_encoders(pooling, shape):
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3], [1]])).long()
    batch = {"input_ids": tokens(4, 7), "attention_mask": mask, "targets": torch.randn(*shape)}
    loss = torch.nn.functional.mse_loss
    model = huggingface.encoder(bert("BertModel").eval(), loss=loss, pooling=pooling, example=batch)
    checked(model, 1e-5)
    assert jax.eval_shape(model.forward, model.params, model.convert(batch)).shape == shape


def test_the_loss_is_that_of_transformers():
    """Shifted labels, padding that does not count, labels of one's own."""
    module = llama().eval()
    model = huggingface.causal_lm(module)
    ids = tokens(3, 9)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [2]])).long()
    labels = ids.masked_fill(torch.rand(3, 9) < 0.3, -100)
    for batch, own in (
        (ids, ids),
        ({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100)),
        ({"input_ids": ids, "attention_mask": mask, "labels": labels}, labels),
    ):
        given = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
        with torch.no_grad():
            theirs = float(module(**given | {"labels": own}).loss)
        op = cx.hessian(model, batch)
        np.testing.assert_allclose(float(op.loss), theirs, rtol=1e-5)
        model.verify(batch)


def test_batches_weigh_by_their_labels():
    model = huggingface.causal_lm(gpt2().eval())
    ids = tokens(4, 12)
    mask = (torch.arange(12) < torch.tensor([[12], [4], [9], [2]])).long()

    def part(rows):
        return {"input_ids": ids[rows], "attention_mask": mask[rows]}

    whole = cx.hessian(model, part(slice(None)))
    parts = cx.hessian(model, [part(slice(0, 1)), part(slice(1, 4))])
    np.testing.assert_allclose(float(parts.loss), float(whole.loss), rtol=1e-6)
    v = np.random.default_rng(0).standard_normal(whole.shape[0]).astype(np.float32)
    a, b = (op.ravel(op @ op.unravel(jnp.asarray(v))) for op in (whole, parts))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_no_array_of_tokens_times_vocabulary():
    """By the compiled program: with twice the vocabulary only the head's share grows."""

    def work(vocab):
        config = transformers.LlamaConfig(**GROUPED | {"vocab_size": vocab, "num_hidden_layers": 1})
        model = huggingface.causal_lm(transformers.LlamaForCausalLM(config).eval())
        model = type(model)(
            model.params,
            model.forward,
            LinearCrossEntropy(model.loss.labels, chunk=64),
            source=model.source,
            convert=model.convert,
        )
        op = cx.hessian(model, tokens(8, 129), where=cx.match_names("*q_proj*"))
        x = jnp.zeros((1, op.shape[0]))
        compiled = jax.jit(lambda op, x: op.product(x)).lower(op, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 8 * 128 * (16384 - 8192)
    assert work(16384) - work(8192) < logits


def test_tied_heads_are_one_parameter():
    model = huggingface.causal_lm(gpt2().eval())
    assert "lm_head.weight" not in model.params
    assert model.name_map["lm_head.weight"] == "transformer.wte.weight"
    op = cx.hessian(model, tokens(2, 6), where=cx.match_names("lm_head.*"))
    assert op.shape == (101 * 32, 101 * 32)


def test_the_model_is_left_as_it_was():
    module = gemma2().eval()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    with torch.no_grad():
        ids = tokens(2, 8)
        logits = module(ids).logits
        huggingface.causal_lm(module).verify(hvp=True)
        assert torch.equal(module(ids).logits, logits)
    assert module.config.final_logit_softcapping == 3.0
    assert all(torch.equal(before[name], p) for name, p in module.state_dict().items())


def test_a_head_that_is_more_than_a_product_is_computed_whole():
    class Doubled(transformers.GPT2LMHeadModel):
        def forward(self, *args, **options):
            outputs = super().forward(*args, **options)
            outputs.logits = outputs.logits + outputs.logits.tanh()
            return outputs

    module = Doubled(gpt2().config).eval()
    with pytest.warns(UserWarning, match="does more to its hidden states than multiply"):
        model = huggingface.causal_lm(module)
    assert isinstance(model.loss, SoftmaxCrossEntropy)
    checked(model, 1e-5)


def test_a_folder(tmp_path):
    llama().save_pretrained(tmp_path)
    checked(huggingface.causal_lm(tmp_path), 1e-5)


class TestBadInput:
    def test_models(self, tmp_path):
        with pytest.raises(ValueError, match="in train mode"):
            huggingface.causal_lm(gpt2().train())
        with pytest.raises(TypeError, match=r"torch\.bfloat16.*module\.float\(\)"):
            huggingface.causal_lm(llama().bfloat16().eval())
        with pytest.raises(TypeError, match="must have a linear head for tokens"):
            huggingface.causal_lm(bert("BertModel").eval())
        with pytest.raises(TypeError, match=r"adapters\.torch\.from_module"):
            huggingface.causal_lm(torch.nn.Linear(3, 3).eval())
        with pytest.raises(OSError, match="model_or_path must be .*nothing is downloaded"):
            huggingface.causal_lm(tmp_path)
        with pytest.raises(ValueError, match="num_labels=1"):
            huggingface.sequence_classification(
                bert("BertForSequenceClassification", num_labels=1).eval()
            )
        with pytest.raises(ValueError, match="pooling must be"):
            huggingface.encoder(bert("BertModel").eval(), loss=lambda a, b: a, pooling="max")

    def test_batches(self):
        model = huggingface.causal_lm(llama().eval())
        with pytest.raises(KeyError, match="must have input_ids"):
            cx.hessian(model, {"ids": tokens(2, 5)})
        masked = huggingface.masked_lm(bert("BertForMaskedLM").eval())
        with pytest.raises(KeyError, match="must have labels, got the keys"):
            cx.hessian(masked, {"input_ids": tokens(2, 5)})
        with pytest.raises(ValueError, match=r"array of tokens \(B, T\)"):
            cx.hessian(model, tokens(5))
