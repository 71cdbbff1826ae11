"""A HookedTransformer of TransformerLens, through the adapter for PyTorch."""

import importlib.util

import pytest

import curvax as cx

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("torchax", "transformer_lens"))):
    pytest.skip("torchax or transformer_lens is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore"),  # of a package that is not ours
]


@pytest.mark.parametrize("act_fn", ["gelu", "silu"])
def test_a_tiny_hooked_transformer(act_fn):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from curvax.adapters.torch import from_module

    config = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=12,
        d_head=8,
        n_heads=2,
        d_vocab=40,
        act_fn=act_fn,
        seed=0,
        device="cpu",
    )
    hooked = HookedTransformer(config).eval()
    tokens = torch.randint(0, 40, (4, 12))
    model = from_module(
        hooked,
        loss=lambda z, y: torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten()),
        inputs=lambda batch: batch[:, :-1],
        targets=lambda batch: batch[:, 1:],
        example=tokens,
    )
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    # The library's own loss is the same.
    with torch.no_grad():
        theirs = float(hooked(tokens, return_type="loss"))
    op = cx.hessian(model, tokens, where=cx.match_names("blocks.*.attn.*"))
    assert float(op.loss) == pytest.approx(theirs, rel=1e-5)
    result = cx.eigsh(op, 2, tol=1e-2, seed=0)
    assert result.all_converged
