"""Modules and losses whose steps depend on the values of a batch, against torch's own."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)
from tests.adapters.torch_modules import batch_for  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from curvax.adapters import torch as adapter  # noqa: E402

pytestmark = pytest.mark.frameworks


class Padded(nn.Module):
    """Tokens and a mask, and a function of them."""

    def __init__(self, function):
        super().__init__()
        self.embedding, self.linear, self.function = nn.Embedding(5, 4), nn.Linear(4, 3), function

    def forward(self, ids, mask):
        return self.function(self.linear(self.embedding(ids)).tanh(), ids, mask)


def by_all(x, ids, mask):
    return x.mean(1) if mask.all() else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def by_index(x, ids, mask):
    return torch.stack([x[mask.bool()].mean(0), x[ids == 2].sum(0), x[0, 0] * mask.max().item()])


def by_length(x, ids, mask):
    longest = int(mask.sum(1).max())
    rows = zip(x[:, :longest], mask.sum(1).tolist(), strict=True)
    return torch.stack([row[:length].mean(0) for row, length in rows])


@pytest.mark.parametrize("function", [by_all, by_index, by_length])
def test_steps_that_depend_on_the_batch(function):
    module = Padded(function)
    mask = (torch.arange(4) < torch.tensor([[4], [2], [3]])).long()
    ids = torch.tensor([[2, 0, 1, 4], [3, 3, 2, 0], [1, 2, 4, 4]])
    options = {"inputs": lambda b: (b["ids"], b["mask"]), "targets": lambda b: b["y"]}
    batch = {"ids": ids, "mask": mask, "y": torch.randn(3, 3)}
    model = adapter.from_module(module, loss=F.mse_loss, example=batch, **options)
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    # A batch with other steps is refused, by its values and in the program.
    other = batch | {"mask": torch.ones_like(mask), "ids": ids.flip(0)}
    with pytest.raises(ValueError, match=r"depends on the values of the batch.*test_torch_steps"):
        cx.hessian(model, [batch, other])
    assert jnp.isnan(model.objective(model.params, model.convert(other))[0])
    with pytest.raises(TypeError, match="depends on the values.*double_backward"):
        cx.hessian(model, batch, microbatch_size=1)
    # Of another shape, the steps are its own.
    part = {name: x[:2] for name, x in batch.items()}
    if function is not by_index:
        np.testing.assert_allclose(
            float(cx.hessian(model, [part]).loss),
            F.mse_loss(module(ids[:2], mask[:2]), part["y"]).item(),
            rtol=1e-5,
        )


LOSSES = {
    "missing": lambda o, t: F.mse_loss(o[~t.isnan()], t[~t.isnan()]),
    "classes": lambda o, t: sum(o[t[:, 0] > c].square().mean() for c in t.sign().unique() if c < 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_steps_of_a_loss_that_depend_on_the_batch(name):
    x, t = batch_for()
    if name == "missing":
        t[0, 1] = float("nan")
    model = adapter.from_module(nn.Linear(4, 2), loss=LOSSES[name], example=(x, t))
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    other = t.flip(0)
    with pytest.raises(ValueError, match=r"module or loss do depends on the values of the batch"):
        cx.hessian(model, [(x, t), (x, other)])


class InPlace(nn.Linear):
    """Which changes its inputs."""

    def forward(self, x):
        return super().forward(x.mul_(0.9))


def test_a_module_that_changes_its_inputs():
    batch = batch_for()
    model = adapter.from_module(InPlace(4, 2), loss=F.mse_loss, example=batch)
    assert model.verify(hvp=True).hvp <= 1e-5
    assert all(map(torch.equal, batch, batch_for()))


class OfValues(nn.Module):
    """What takes values of the batch, whose shapes do not depend on them."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1].repeat_interleave(2, 0)[::2])


def test_batches_of_other_values_are_no_other_steps():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(6, 3, 4, generator=generator), torch.tensor([0, 1, 1, 0, 1, 0])

    def loss(outputs, labels):
        return ((outputs - F.one_hot(labels, num_classes=2)) ** 2).mean()

    model = adapter.from_module(OfValues(), loss=loss)
    whole, parts = cx.hessian(model, (x, t)), cx.hessian(model, [(x[:3], t[:3]), (x[3:], t[3:])])
    v = jnp.asarray(np.random.default_rng(0).standard_normal((1, whole.shape[0])), jnp.float32)
    np.testing.assert_allclose(parts.product(v), whole.product(v), rtol=1e-4, atol=1e-6)
