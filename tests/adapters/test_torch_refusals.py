"""Torch modules, batches and losses that are refused: by which message, and left as they were."""

import importlib.util

import pytest

import curvax as cx

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)
from tests.adapters.torch_modules import Applied, batch_for, same, state_of  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from curvax.adapters import torch as adapter  # noqa: E402

pytestmark = pytest.mark.frameworks


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 4))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_of_torch_jit(make):
    module = make(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    whole = nn.Sequential(module, nn.Linear(3, 2))
    for given, match in ((module, "it is a"), (whole, "its part '0' is a")):
        before = state_of(whole)
        with pytest.raises(TypeError, match=rf"{match} .*torch\.jit.*double_backward"):
            adapter.from_module(given, loss=F.mse_loss, example=batch_for())
        assert same(before, state_of(whole))
        assert all(p.requires_grad for p in given.parameters())
    op = adapter.double_backward(whole, F.mse_loss, batch_for())
    assert op.shape == (23, 23)


@pytest.mark.parametrize(
    "function,match",
    [
        (lambda x: torch.autograd.grad(x.sum(), x)[0], "grad has no lowering"),
        (lambda x: torch.special.airy_ai(x), "airy_ai has no lowering"),
        (lambda x: x * x.sum().item(), "depends on the values"),
        (lambda x: x if x.argmax() > 3 else -x, "depends on the values"),
        (lambda x: x[x.detach() > 0].mean() * x, "depends on the values"),
    ],
)
def test_what_has_no_lowering(function, match):
    module = Applied(function)
    before = state_of(module)
    with pytest.raises(TypeError, match=f"{match}.*double_backward"):
        adapter.from_module(module, loss=F.mse_loss, example=batch_for())
    assert same(before, state_of(module))


def test_autocast():
    def mixed(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (x @ torch.ones(3, 3)).float()

    with pytest.raises(TypeError, match=r"torch\.autocast has no lowering"):
        adapter.from_module(Applied(mixed), loss=F.mse_loss, example=batch_for())
    module = nn.Linear(4, 2)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"torch\.autocast"):
        adapter.from_module(module, loss=F.mse_loss, example=batch_for())


def test_batches_and_losses_that_do_not_fit():
    module, (x, y) = nn.Linear(4, 2), batch_for()
    before = state_of(module)
    for loss, batch, error, match in (
        (
            nn.CrossEntropyLoss(),
            (x, y[:3, 0].long()),
            ValueError,
            r"its loss cannot .*int32 .3,",
        ),
        (nn.CrossEntropyLoss(), (x, torch.full((6,), 7)), ValueError, "its loss .*out of b"),
        (F.mse_loss, (x[:, :3], y), ValueError, r"the module or .*\(6, 3\).*inputs="),
        (lambda o, t: F.mse_loss(o.logits, t), (x, y), AttributeError, "logits"),
        (F.mse_loss, (x,), TypeError, r"tuple \(inputs, targets\)"),
    ):
        with pytest.raises(error, match=match):
            adapter.from_module(module, loss=loss, example=batch)
        assert same(before, state_of(module))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y))
    for example in (loader, iter(loader), loader.dataset):
        with pytest.raises(TypeError, match=r"example must be one batch.*pass next\(iter\("):
            adapter.from_module(module, loss=F.mse_loss, example=example)
    model = adapter.from_module(module, loss=F.mse_loss)
    with pytest.raises(ValueError, match="batch"):
        cx.hessian(model, [])


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_tensors_that_are_no_numbers_yet():
    with pytest.raises(ValueError, match=r"'weight' has no shape yet: call the module once"):
        adapter.from_module(nn.LazyLinear(2), loss=F.mse_loss)
    integers = nn.Module()
    integers.weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"\['torch\.int8'\].*module\.float\(\)"):
        adapter.from_module(integers, loss=F.mse_loss)
    quantized = nn.Linear(4, 2)
    quantized.register_buffer(
        "table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    )
    with pytest.raises(TypeError, match=r"'table' must be a plain tensor, got quantized"):
        adapter.from_module(quantized, loss=F.mse_loss)


LABELLED = {
    "cross entropy": lambda o, t: F.cross_entropy(o, t),
    "gather": lambda o, t: -F.log_softmax(o, -1).gather(1, t[:, None]).mean(),
    "one hot": lambda o, t: ((o - F.one_hot(t, 2)) ** 2).mean(),
}


@pytest.mark.parametrize("loss", LABELLED)
@pytest.mark.parametrize("label", [7, -1])
def test_labels_out_of_range_in_a_later_batch(loss, label):
    """JAX would clamp or wrap them: torch computes the loss of every batch once."""
    x, t = batch_for()[0], torch.tensor([0, 1, 1, 0, 1, 0])
    model = adapter.from_module(nn.Linear(4, 2), loss=LABELLED[loss], example=(x, t))
    wrong = t.clone()
    wrong[2] = label
    with pytest.raises(ValueError, match="its loss cannot be computed of this batch"):
        cx.hessian(model, [(x, t), (x, wrong)])


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_torch_has_no_new_accelerator():
    """torchax registers one, to which DataLoader and DataParallel would turn."""
    adapter.from_module(nn.Linear(4, 2), loss=F.mse_loss, example=batch_for())
    assert not torch.accelerator.is_available()
    loader = torch.utils.data.DataLoader(batch_for()[0], batch_size=3, pin_memory=True)
    assert len(list(loader)) == 2
