"""Losses and batches of PyTorch on JAX, against torch's own."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)
from tests.adapters.torch_modules import Applied, classes, mlp  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from curvax.adapters import torch as adapter  # noqa: E402
from curvax.adapters.adapted import VerificationError  # noqa: E402

pytestmark = pytest.mark.frameworks

LOSSES = {
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), "labels"),
    "ignoring": (nn.CrossEntropyLoss(ignore_index=1), "labels"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), "labels"),
    "weighted-smoothed": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1),
        "labels",
    ),
    "functional": (F.cross_entropy, "labels"),
    "probabilities": (lambda z, y: F.cross_entropy(z, y.softmax(-1)), "values"),
    "nll": (lambda z, y: F.nll_loss(F.log_softmax(z, -1), y), "labels"),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5])), "bits"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_torch(loss):
    function, kind = LOSSES[loss]
    values = torch.randn(20, 3)
    targets = {"labels": classes(20), "values": values, "bits": (values > 0).float()}[kind]
    batch = (torch.randn(20, 5), targets)
    found = adapter.from_module(mlp(), loss=function, example=batch).verify(hvp=True)
    assert max(found.loss, found.gradient, found.hvp) <= 1e-5


def test_classes_on_the_second_axis():
    batch = (torch.randn(4, 1, 6, 6), torch.randint(0, 3, (4, 6, 6)))
    module = nn.Conv2d(1, 3, 3, padding=1)
    model = adapter.from_module(module, loss=nn.CrossEntropyLoss(), example=batch)
    assert model.verify(hvp=True).hvp <= 1e-5
    # The loss is convex in the logits, which are linear in the parameters.
    gauss_newton, hessian = (make(model, batch) for make in (cx.ggn, cx.hessian))
    exact = cx.fisher(model, batch, kind="exact")
    v = hessian.unravel(jnp.asarray(np.random.default_rng(0).standard_normal(30), jnp.float32))
    wanted = hessian.ravel(hessian @ v)
    for op in (gauss_newton, exact):
        np.testing.assert_allclose(op.ravel(op @ v), wanted, rtol=0, atol=1e-5)


LABELS = torch.tensor([0, 0, 0, 1, 2, 1])
COUNTING = {
    "nll-ignoring": nn.NLLLoss(ignore_index=0),
    "nll-weighted": nn.NLLLoss(weight=torch.tensor([1.0, 5.0, 0.2])),
    "nll-functional": F.nll_loss,
    "functional": F.cross_entropy,
    "weighted-smoothed": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 5.0, 0.2]), label_smoothing=0.3
    ),
    "ignoring": nn.CrossEntropyLoss(ignore_index=0),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2])),
    "plain": nn.CrossEntropyLoss(),
}


@pytest.mark.parametrize("name", COUNTING)
def test_batches_weigh_as_their_labels_do(name):
    """Several batches are one, for every loss of torch that divides by the weights of labels."""
    loss, x = COUNTING[name], torch.randn(6, 3)
    module = nn.Sequential(nn.Linear(3, 3), nn.LogSoftmax(-1))
    model = adapter.from_module(module, loss=loss)
    labels = LABELS.clone()
    if callable(loss) and not isinstance(loss, nn.Module):
        labels[:3] = -100  # what functions ignore by default
    parts = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    eye = jnp.eye(12, dtype=jnp.float32)
    wanted = np.asarray(cx.hessian(model, (x, labels)).product(eye))
    for op in (
        cx.hessian(model, parts),
        cx.hessian(model, (x, labels), microbatch_size=4),
        adapter.double_backward(module, loss, parts),
    ):
        np.testing.assert_allclose(op.product(eye), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_data_loader_is_the_whole_set():
    x, y = torch.randn(21, 5), classes(21)
    module = mlp()
    model = adapter.from_module(module, loss=nn.CrossEntropyLoss())
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    one, three = cx.hessian(model, (x, y)), cx.hessian(model, loader)
    assert three.num_microbatches == 3
    np.testing.assert_allclose(float(three.loss), float(one.loss), rtol=1e-6)
    v = one.unravel(jnp.asarray(np.random.default_rng(0).standard_normal(one.shape[0]), "float32"))
    a, b = one.ravel(one @ v), three.ravel(three @ v)
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)


def test_without_an_example_the_first_batch_is_compared():
    model = adapter.from_module(mlp(), loss=nn.MSELoss())
    with pytest.raises(ValueError, match="verify needs a batch"):
        model.verify()
    batch = (torch.randn(4, 5), torch.randn(4, 3))
    cx.hessian(model, batch)
    assert model.verify().outputs <= 1e-5
    # A module that is no fixed function is found out there too.
    loud = adapter.from_module(Applied(lambda x: x + torch.randn_like(x)).eval(), loss=F.mse_loss)
    with pytest.raises(VerificationError, match=r"outputs by .* Does the module draw random"):
        cx.hessian(loud, (torch.randn(4, 4), torch.randn(4, 2)))
    # And leaves no tracer behind that would break the next.
    assert model.verify(hvp=True).hvp <= 1e-5
