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


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 2, "use_dora": True}], ids=["lora", "dora"])
def test_low_ranks_of_a_llama(options):
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=8, **options)
    module = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()
    with torch.no_grad():  # B is zero before training, and half of the Hessian with it
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.randint(0, 61, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    model = huggingface.causal_lm(module, example=batch)
    assert model.params and all("lora" in name for name in model.params)
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    op = cx.hessian(model, batch, where=cx.match_names("*q_proj*"))
    assert 0 < op.shape[0] < sum(leaf.size for leaf in model.params.values())
