"""Whatever torch modules do: blocks, layers, losses and operations, against double backward."""

import importlib.util

import jax
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)
from tests.adapters import (  # noqa: E402  # noqa: E402
    zoo_algebra,
    zoo_elementwise,
    zoo_in_place,
    zoo_layers,
    zoo_losses,
    zoo_models,
    zoo_shapes,
)
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from curvax.adapters import torch as adapter  # noqa: E402

pytestmark = pytest.mark.frameworks

EXACT = "torch's own double backward"


@pytest.fixture
def double():
    """float64 in JAX and in what torch makes."""
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def some(cases, fast):
    """All cases, those that are not named marked slow."""
    assert set(fast) <= set(cases)
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def mean_square(outputs, targets):
    if torch.is_tensor(targets):
        return ((outputs - targets) ** 2).mean()
    return sum(mean_square(outputs[name], targets[name]) for name in targets)


def like(outputs):
    if torch.is_tensor(outputs):
        return torch.randn_like(outputs)
    return {name: like(x) for name, x in outputs.items()}


def agree(module, inputs, loss=mean_square, targets=None, limit=1e-10, differences=1e-6):
    """A module's conversion is the module, to second order."""
    module.eval()
    if targets is None:
        targets = like(module(*inputs) if isinstance(inputs, tuple) else module(inputs))
    model = adapter.from_module(module, loss=loss, example=(inputs, targets))
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient) <= limit, found
    assert found.hvp <= (limit if found.reference == EXACT else differences), found
    return found


@pytest.mark.parametrize("name", some(zoo_models.MODELS, ["group-norm", "swin"]))
def test_blocks(name, double):
    agree(*zoo_models.MODELS[name]())


# A part of this one computes in float64, as its own source writes it.
SINGLE = [name for name in zoo_models.MODELS if name != "rms-norm"]


@pytest.mark.parametrize("name", some(SINGLE, ["mixer"]))
def test_blocks_in_single_precision(name):
    agree(*zoo_models.MODELS[name](), limit=1e-5, differences=3e-2)


@pytest.mark.parametrize("name", some(zoo_layers.LAYERS, ["conv-transposed-groups", "avg-ceil"]))
def test_layers(name, double):
    layer, shape = zoo_layers.LAYERS[name]
    width = shape[1]
    first = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}.get(len(shape))
    before = nn.Linear(shape[-1], shape[-1]) if first is None else first(width, width, 1)
    agree(nn.Sequential(before, layer()), torch.randn(shape))


@pytest.mark.parametrize("name", some(zoo_losses.LOSSES, ["multilabel-margin"]))
def test_losses(name, double):
    loss, targets, act = zoo_losses.LOSSES[name]
    agree(nn.Sequential(nn.Linear(4, 3), act()), torch.randn(6, 4), loss, targets())


class Each(nn.Module):
    """Functions of one matrix each: its Hessian has a block of its own for each."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        values = {f"of_{name}": nn.Parameter(torch.randn(4, 5)) for name in functions}
        self.values = nn.ParameterDict(values)

    def forward(self, _):
        return {name: f(self.values[f"of_{name}"]) for name, f in self.functions.items()}


def written(change):
    def function(x):
        x = x * 1.0
        change(x)
        return x

    return function


def into_zeros(write):
    def function(x):
        zeros = torch.zeros(4, 5)
        write(zeros, x)
        return zeros * zeros + zeros

    return function


KINDS = {
    "reductions": zoo_elementwise.REDUCTIONS,
    "elementwise": zoo_elementwise.ELEMENTWISE,
    "shapes": zoo_shapes.SHAPES,
    "in-place": {name: written(f) for name, f in zoo_in_place.IN_PLACE.items()},
    "into-zeros": {name: into_zeros(f) for name, f in zoo_in_place.INTO_ZEROS.items()},
    "algebra": zoo_algebra.ALGEBRA,
    "fourier": zoo_algebra.FOURIER,
}
SIZE = 20
GROUPS = {
    f"{kind}-{at}": dict(list(functions.items())[at : at + SIZE])
    for kind, functions in KINDS.items()
    for at in range(0, len(functions), SIZE)
}


@pytest.mark.parametrize("group", some(GROUPS, ["into-zeros-0"]))
def test_operations(group, double):
    agree(Each(GROUPS[group]), torch.zeros(1))


# Where a function has a kink, or a tie to break, torch has a choice of its own.
TIES = torch.tensor([[1.0, 1, 0], [0, 0, 0], [2, -2, 2]], dtype=torch.float64)
KINKS = {
    "abs": lambda x: x.abs(),
    "amax": lambda x: x.amax(1),
    "clamp": lambda x: x.clamp(0, 1),
    "clamp_min": lambda x: x.clamp(min=0),
    "cummax": lambda x: x.cummax(1)[0],
    "hardtanh": F.hardtanh,
    "hardswish": lambda x: F.hardswish(3 * x),
    "huber": lambda x: F.huber_loss(x, torch.zeros(3, 3)),
    "l1": lambda x: F.l1_loss(x, torch.zeros(3, 3)),
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "max": lambda x: x.max(1)[0],
    "max_pool": lambda x: F.max_pool1d(x[None], 2, 1),
    "min": lambda x: x.min(1)[0],
    "relu6": lambda x: F.relu6(3 * x),
    "norm1": lambda x: x.norm(p=1, dim=1),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, torch.zeros(3, 3)),
    "softsign": F.softsign,
    "std": lambda x: x.std(1),
}


def test_kinks_and_ties(double):
    module = Each(KINKS)
    for value in module.values.values():
        value.data = TIES.clone()
    agree(module, torch.zeros(1))


REFUSED = {
    "airy": (torch.special.airy_ai, "special_airy_ai has no lowering"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "depends on the values"),
    "select": (lambda x: x[x > 0], "depends on the values"),
    "frequency": (
        lambda x: F.embedding(torch.tensor([0, 0, 1]), x, scale_grad_by_freq=True),
        r"Embedding\(scale_grad_by_freq=True\) has no lowering",
    ),
    "eig": (lambda x: torch.linalg.eigvals(x[:, :4]).abs(), "non-symmetric eigenvectors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused(name, double):
    function, match = REFUSED[name]
    module = Each({"it": function})
    targets = like(module(None))
    kept = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(TypeError, match=f"{match}.*double_backward"):
        adapter.from_module(module, loss=mean_square, example=(torch.zeros(1), targets))
    assert all(torch.equal(a, b) for a, b in zip(kept, module.parameters(), strict=True))
