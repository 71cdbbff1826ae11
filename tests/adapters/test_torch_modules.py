"""PyTorch modules on JAX: outputs, losses, gradients and products against torch's own."""

import dataclasses
import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)
from tests.adapters.torch_modules import classes, mlp  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from curvax.adapters import torch as adapter  # noqa: E402
from curvax.adapters.adapted import VerificationError  # noqa: E402

pytestmark = pytest.mark.frameworks

# Of a product against torch's double backward, relative.
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def bits(request):
    """The dtype, with JAX's 64-bit mode on where it is needed."""
    with jax.enable_x64(request.param is torch.float64):
        yield request.param


class CNN(nn.Module):
    """Convolution, batch normalisation, max pooling, dropout."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.pool, self.drop, self.head = nn.MaxPool2d(2), nn.Dropout(0.2), nn.Linear(36, 3)

    def forward(self, x):
        x = self.pool(F.silu(self.norm(self.conv(x))))
        return self.head(self.drop(x.flatten(1)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    """With torch's fused attention, whose own double backward does not exist on a CPU."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


class Applied(nn.Module):
    """A linear layer and a function."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 3), function

    def forward(self, x):
        return self.function(self.linear(x))


def of(dtype, *shape):
    return torch.randn(*shape, dtype=dtype)


def cnn(dtype):
    module = CNN().to(dtype)
    for _ in range(3):
        module(of(dtype, 10, 1, 8, 8))  # running statistics other than 0 and 1
    return module, (of(dtype, 10, 1, 8, 8), classes()), nn.CrossEntropyLoss()


def groups():
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.PReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


PROBLEMS = {
    "mlp": lambda t: (mlp().to(t), (of(t, 20, 5), classes(20)), nn.CrossEntropyLoss()),
    "mlp-mse": lambda t: (mlp().to(t), (of(t, 20, 5), of(t, 20, 3)), nn.MSELoss()),
    "cnn": cnn,
    "lstm": lambda t: (Recurrent(nn.LSTM).to(t), (of(t, 6, 7, 4), of(t, 6, 3)), F.mse_loss),
    "gru": lambda t: (Recurrent(nn.GRU).to(t), (of(t, 6, 7, 4), of(t, 6, 3)), nn.HuberLoss()),
    "attention": lambda t: (Attention().to(t), (of(t, 6, 7, 8), of(t, 6, 3)), F.mse_loss),
    "groups": lambda t: (groups().to(t), (of(t, 6, 4, 9), of(t, 6, 3)), F.mse_loss),
}


@pytest.mark.parametrize("bits", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_module_is_what_it_is_in_torch(problem, bits):
    module, batch, loss = PROBLEMS[problem](bits)
    model = adapter.from_module(module.eval(), loss=loss, example=batch)
    found = model.verify(hvp=True)
    assert found.outputs <= LIMIT[bits] and found.loss <= LIMIT[bits]
    assert found.gradient <= LIMIT[bits] and found.hvp <= LIMIT[bits]
    assert found.reference == "torch's own double backward"
    assert set(model.params) == dict(module.named_parameters()).keys()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_tied_weights_are_one_parameter():
    batch = (torch.randn(6, 4), torch.randn(6, 4))
    model = adapter.from_module(Tied(), loss=F.mse_loss, example=batch)
    assert list(model.params) == ["a.weight", "a.bias", "b.bias"]
    assert model.name_map["b.weight"] == "a.weight"
    assert model.verify(hvp=True).hvp <= 1e-5
    for pattern in ("a.weight", "b.weight"):
        op = cx.hessian(model, batch, where=cx.match_names(pattern))
        assert op.space.names == ("a.weight",)
    with pytest.raises(ValueError, match=r"'c\.\*' matches no name; the nearest"):
        cx.hessian(model, batch, where=cx.match_names("c.*"))


class Shared(nn.Module):
    """One part under three names, and a scalar; it remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.layers = nn.ModuleList([self.a, nn.Linear(4, 3)])
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        self.last = self.layers[1](torch.tanh(self.b(self.a(x)))) * self.gain
        return self.last


def test_shared_parts_are_left_as_they_were():
    module, batch = Shared(), (torch.randn(6, 4), torch.randn(6, 3))
    before = module(batch[0]).detach()
    kept, weight = module.last, module.a.weight
    model = adapter.from_module(module, loss=F.mse_loss, example=batch)
    assert module.a.weight is weight and module.b.weight is weight
    module.last = kept
    model.objective(model.params, model.convert(batch))
    assert module.last is kept
    assert sorted(model.params) == [
        "a.bias",
        "a.weight",
        "gain",
        "layers.1.bias",
        "layers.1.weight",
    ]
    assert model.verify(hvp=True).hvp <= 1e-5
    assert torch.equal(module(batch[0]), before)
    op = cx.hessian(model, batch, where=cx.match_names("layers.0.*"))
    assert op.space.names == ("a.bias", "a.weight")


def test_frozen_parameters_are_constants():
    module = mlp()
    module[0].requires_grad_(False)
    batch = (torch.randn(6, 5), torch.randn(6, 3))
    model = adapter.from_module(module, loss=F.mse_loss, example=batch)
    assert not any(name.startswith("0.") for name in model.params)
    assert model.verify(hvp=True).hvp <= 1e-5


def test_changes_in_place_do_not_reach_the_model():
    module, batch = mlp(), (torch.randn(6, 5), torch.randn(6, 3))
    model = adapter.from_module(module, loss=F.mse_loss, example=batch)
    before = np.array(model.params["0.weight"])
    with torch.no_grad():
        module[0].weight.add_(1.0)
        batch[0].add_(1.0)
    np.testing.assert_array_equal(model.params["0.weight"], before)


class Attribute(nn.Module):
    """With a tensor that is no buffer, and a parametrised layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.scale = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x):
        return self.scale * self.linear(x).tanh()


def test_parametrised_layers_and_plain_tensors():
    module, batch = Attribute().eval(), (torch.randn(6, 4), torch.randn(6, 3))
    scale = module.scale
    model = adapter.from_module(module, loss=F.mse_loss, example=batch)
    assert model.verify(hvp=True).hvp <= 1e-5
    assert module.scale is scale


def without_gradient(x):
    with torch.no_grad():
        scale = x.pow(2).mean()
    return x / scale * x.detach()


def moved(x):
    """As a module does that keeps its own device."""
    device = torch.device("cpu")
    steps = torch.arange(3, device="cpu", dtype=x.dtype).to(device)
    return x.to("cpu").cpu().to(device=device, dtype=x.dtype) * torch.ones(3, device=device) + steps


def test_moves_to_the_cpu_stay_on_jax():
    batch = (torch.randn(6, 4), torch.randn(6, 3))
    model = adapter.from_module(Applied(moved), loss=F.mse_loss, example=batch)
    assert model.verify(hvp=True).hvp <= 1e-5


def test_where_torch_stops_gradients_so_do_we():
    batch = (torch.randn(6, 4), torch.randn(6, 3))
    model = adapter.from_module(Applied(without_gradient), loss=F.mse_loss, example=batch)
    found = model.verify(hvp=True)
    assert max(found.gradient, found.hvp) <= 1e-5
    with torch.no_grad():  # the caller's own does not count
        assert cx.eigsh(cx.hessian(model, batch), 1).eigenvalues[0] > 0.1


def test_a_double_backward_that_is_wrong_in_torch_is_told_apart():
    """torch 2.13's is, of `weight_norm`, by float64 differences."""
    with jax.enable_x64(True):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
        module = nn.Sequential(layer, nn.Tanh())
        batch = (of(torch.float64, 6, 4), of(torch.float64, 6, 3))
        model = adapter.from_module(module, loss=F.mse_loss, example=batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = model.verify(hvp=True)
        assert found.gradient <= 1e-10 and found.hvp <= 1e-6
        # A later torch may be right.
        right = found.reference == "torch's own double backward" and found.hvp <= 1e-10
        assert right or any("own double backward is wrong" in str(w.message) for w in caught)


def test_a_wrong_conversion_is_found():
    """A loss that is not the module's: outputs agree, the loss does not."""
    batch = (torch.randn(6, 5), torch.randn(6, 3))
    model = adapter.from_module(mlp(), loss=F.mse_loss, example=batch)
    wrong = dataclasses.replace(model, loss=lambda outputs, b: jnp.mean((outputs - b[1]) ** 4))
    with pytest.raises(VerificationError, match=r"loss by .* \(allowed 1e-04\)"):
        wrong.verify()
    # A loss with the same value and another second derivative.
    arrays = model.convert(batch)
    target = float(model.objective(model.params, arrays)[0])

    def same_value(outputs, b):
        mean = jnp.mean((outputs - b[1]) ** 2)
        return mean + (mean - target) ** 2

    bent = dataclasses.replace(model, loss=same_value)
    bent.verify()
    with pytest.raises(VerificationError, match="hvp by"):
        bent.verify(hvp=True)


def refused(error, match, module, loss=F.mse_loss, **options):
    with pytest.raises(error, match=match):
        adapter.from_module(module, loss=loss, **options)


class TestBadInput:
    def test_dropout_and_batch_norm_in_train_mode(self):
        refused(ValueError, r"'norm' \(BatchNorm2d\) is in train mode.*module.eval\(\)", CNN())
        refused(ValueError, r"'1' \(Dropout\) .* p = 0\.5", nn.Sequential(mlp(), nn.Dropout(0.5)))
        refused(ValueError, r"self_attn.*dropout = 0\.1", Attention())
        adapter.from_module(nn.Sequential(mlp(), nn.Dropout(0.0)), loss=F.mse_loss)

    def test_modules(self):
        refused(TypeError, "must be a torch.nn.Module, got function", lambda x: x)
        refused(ValueError, "got none with requires_grad", mlp().requires_grad_(False))
        refused(ValueError, "got none with requires_grad", nn.ReLU())

    def test_dtypes(self):
        refused(
            TypeError, r"'0\.weight' must be float32 or float64, got torch\.float16", mlp().half()
        )
        refused(ValueError, r"'0\.weight' has dtype torch\.float64.*jax_enable_x64", mlp().double())
        batch = (torch.randn(4, 5).double(), torch.randn(4, 3))
        refused(
            ValueError, r"batch\[0\] has dtype torch\.float64.*\.float\(\)", mlp(), example=batch
        )
        model = adapter.from_module(mlp(), loss=F.mse_loss)
        with pytest.raises(ValueError, match="integers beyond 32 bits"):
            model.convert(torch.tensor([2**40]))

    def test_devices(self):
        refused(ValueError, r"'0\.weight' must be on the CPU.*device meta: load", mlp().to("meta"))

    def test_weights_that_are_not_finite(self):
        module = mlp()
        module[2].bias.data[3] = float("nan")
        refused(ValueError, r"'2\.bias' is not finite: 1 of 16 entries", module)

    def test_losses(self):
        refused(TypeError, "loss must be callable as", mlp(), loss="mse")
        refused(ValueError, "reduction='mean', got 'sum'", mlp(), loss=nn.MSELoss(reduction="sum"))
        batch = (torch.randn(4, 5), torch.rand(4, 3))
        loss = nn.CrossEntropyLoss()
        refused(TypeError, "must be class indices, got float32", mlp(), loss=loss, example=batch)

    def test_what_a_loss_returns(self):
        batch = (torch.randn(4, 5), torch.randn(4, 3))
        refused(TypeError, "loss must be callable as", mlp(), loss=nn.MSELoss, example=batch)
        for loss, error, match in (
            (lambda o, t: (o - t) ** 2, ValueError, r"one number.*\(4, 3\)"),
            (lambda o, t: 1.0, TypeError, "must return a torch tensor, got float"),
        ):
            refused(error, match, mlp(), loss=loss, example=batch)
        adapter.from_module(mlp(), loss=nn.KLDivLoss(reduction="batchmean"))

    @pytest.mark.parametrize(
        "batch,match",
        [
            ([torch.ones(4, 5), torch.ones(4, 3)], r"tuple \(inputs, targets\), got Tensor"),
            (torch.ones(4, 5), r"tuple \(inputs, targets\), got"),
            ({"x": torch.ones(4, 5)}, r"got a dict with the keys \['x'\]: say by inputs="),
            ((torch.ones(4, 5), torch.ones(4, 3), 1), "got a tuple of 3"),
            (
                (torch.ones(4, 5), "abc"),
                r"batch\[1\] must be a tensor, an array, a number.*got str: leave out",
            ),
            (None, "got NoneType"),
        ],
    )
    def test_batches(self, batch, match):
        model = adapter.from_module(mlp(), loss=F.mse_loss)
        with pytest.raises(TypeError, match=match):
            cx.hessian(model, batch)

    def test_operations_without_a_lowering(self):
        batch = (torch.randn(4, 4), torch.randn(4, 3))
        for function, match in (
            (torch.special.airy_ai, "special_airy_ai has no lowering.*double_backward"),
            (lambda x: x if x.sum() > 0 else -x, "depends on the values.*double_backward"),
            (lambda x: x * x.sum().item(), "depends on the values.*double_backward"),
        ):
            refused(TypeError, match, Applied(function), example=batch)

    def test_verify(self):
        batch = (torch.randn(4, 5), torch.randn(4, 3))
        model = adapter.from_module(mlp(), loss=F.mse_loss, example=batch)
        with pytest.raises(TypeError, match="hvp must be True or False"):
            model.verify(hvp="yes")
        with pytest.raises(VerificationError, match=r"hvp by .* \(allowed 1e-12\)"):
            model.verify(hvp=True, tol=1e-12)
