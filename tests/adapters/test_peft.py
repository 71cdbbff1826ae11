"""Adapters of PEFT: the base model is frozen, and the low ranks are the parameters."""

import importlib.util

import pytest

import curvax as cx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)

from curvax.adapters import huggingface  # noqa: E402

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of PEFT's use of transformers
]


def low_ranks(base, targets, **options):
    """A model for training by PEFT, as it is after some steps, and a batch of padded tokens."""
    lora = peft.LoraConfig(target_modules=targets, lora_alpha=8, **options)
    module = peft.get_peft_model(base, lora).eval()
    with torch.no_grad():  # B is zero before training, and half of the Hessian with it
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    return module, {"input_ids": torch.randint(1, 61, (3, 9)), "attention_mask": mask}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 2, "use_dora": True}], ids=["lora", "dora"])
def test_low_ranks_of_a_llama(options):
    module, batch = low_ranks(llama(), ["q_proj", "v_proj"], **options)
    model = huggingface.causal_lm(module, example=batch)
    assert model.params and all("lora" in name for name in model.params)
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    op = cx.hessian(model, batch, where=cx.match_names("*q_proj*"))
    assert 0 < op.shape[0] < sum(leaf.size for leaf in model.params.values())


@pytest.mark.parametrize("trained", [True, False])
def test_low_ranks_of_the_head(trained):
    module, batch = low_ranks(llama(), ["lm_head", "q_proj"], r=3)
    if not trained:  # the logits are then those of the frozen head
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.mul_("lora_B" not in name)
    with pytest.warns(UserWarning, match="more to its hidden states than multiply by a matrix"):
        model = huggingface.causal_lm(module, example=batch)
    assert any("lm_head" in name for name in model.params)
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
