"""Modules whose derivatives or tensors a conversion could lose, against torch's own."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)
from tests.adapters.torch_modules import Applied, batch_for, same, state_of  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from curvax.adapters import torch as adapter  # noqa: E402
from curvax.adapters.verification import VerificationError  # noqa: E402

pytestmark = pytest.mark.frameworks


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeApart(torch.autograd.Function):
    """In the newer form, with a result that has no gradient, and no_grad and detach inside."""

    @staticmethod
    def forward(x):
        with torch.no_grad():
            return x.detach() ** 3, x.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Reversed(torch.autograd.Function):
    """As domain adversarial training has it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


# Bound before anything is converted, as modules do.
cube, cube_apart, rounded = Cube.apply, CubeApart.apply, Rounded.apply


def inner(x):
    """With a stop of gradients that a checkpoint keeps."""
    return (x.sin() * x).tanh() + x.detach() * x


HELD = {"list": [torch.tensor([1.0, -1.0, 2.0])], "shape": (2, 3)}


def closure(scale):
    return lambda x: x.tanh() * scale


def written(x):
    """Into zeros, by index, slice, view and row."""
    out = torch.zeros(len(x), 3)
    out[0].add_(x[1])
    row, column = out[0], out[:, 1]
    out[1:, 2] = x[1:, 0].sin()
    column += x[:, 1] ** 2
    out[torch.arange(2), torch.tensor([0, 0])] = x[:2, 2]
    return out * out + row


def steered(x):
    """By the values of constants."""
    mask = torch.triu(torch.ones(3, 3), 1).bool()
    for i in range(int(mask.sum())):
        mask[i, 0] |= bool(torch.arange(3)[i] > 1)
    count = mask.nonzero().shape[0]
    return (x[:, :, None] * x[:, None, :]).masked_fill(mask, 0.5).sum(-1) / count


def counted(x):
    """With constants changed in place before they meet x."""
    steps = torch.arange(3)
    steps += 1
    steps[0] = 5
    return x.tanh() * steps


def compiled(x):
    return torch.compile(lambda y: y.tanh() * 2, backend="eager")(x)


FUNCTIONS = {
    "function": lambda x: cube(x),
    "function apart": lambda x: cube_apart(x)[0] + 0.1 * cube_apart(x)[1],
    "reentrant": lambda x: checkpoint(inner, x, use_reentrant=True),
    "checkpoint": lambda x: checkpoint(inner, x, use_reentrant=False),
    "data": lambda x: x * x.data + x[:, 1:].detach().sum() * x,
    "tensor": lambda x: (x + torch.tensor([1.0, 2.0, 3.0])).tanh(),
    "linspace": lambda x: x.tanh() * torch.linspace(0, 1, 3),
    "new": lambda x: x.tanh() * x.new_tensor([1.0, 2.0, 3.0]) + x.new_ones(3) + torch.ones_like(x),
    "list": lambda x: x.tanh() * HELD["list"][0] + torch.ones(HELD["shape"])[0],
    "closure": closure(torch.tensor([0.5, 1.0, -2.0])),
    "wide scalar": lambda x: x.tanh() * torch.tensor(np.sqrt(2.0)),
    "tensor of tensors": lambda x: x.tanh() * torch.tensor([x[0, 0].detach(), 2.0, 3.0]),
    "written": written,
    "steered": steered,
    "counted": counted,
    "type_as": lambda x: x.tanh() * torch.arange(3).type_as(x) + x.type_as(torch.arange(3)),
    "compiled": compiled,
}
QUICK = {"function", "reentrant", "tensor", "written", "steered"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FUNCTIONS],
)
def test_functions_are_what_they_are_in_torch(name):
    module = Applied(FUNCTIONS[name]).eval()
    before = state_of(module)
    model = adapter.from_module(module, loss=F.mse_loss, example=batch_for())
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    assert found.leaf_gradient <= 1e-4, found
    assert same(before, state_of(module))


def test_the_eigenvalue_of_a_function_with_its_own_backward():
    """Against double backward, which differentiates the backward as it is written."""
    module = Applied(cube)
    model = adapter.from_module(module, loss=F.mse_loss, example=batch_for())
    ours = cx.eigsh(cx.hessian(model, batch_for()), 1, tol=1e-5, seed=0).eigenvalues
    theirs = cx.eigsh(
        adapter.double_backward(module, F.mse_loss, batch_for()), 1, tol=1e-5, seed=0
    ).eigenvalues
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("function", [rounded, Reversed.apply, closure(torch.ones(3))])
def test_a_backward_that_is_no_derivative_is_refused(function):
    module = Applied(lambda x: function(x).tanh())
    if function not in (rounded, Reversed.apply):  # a gradient that a hook changes
        module.first.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(VerificationError, match=r"gradient of 'first\.\w+' by .*double_backward"):
        adapter.from_module(module, loss=F.mse_loss, example=batch_for())
    op = adapter.double_backward(module, F.mse_loss, batch_for())
    assert np.isfinite(op.product(jnp.ones((1, op.shape[0])))).all()


class Listed(nn.Module):
    """With parameters and layers in lists and closures that torch does not search."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)
        self.layers, weight = [self.a, self.b], self.b.weight
        self.penalty = lambda: weight.square().sum()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x * self.penalty()


class Remembering(nn.Module):
    """With buffers that it changes in a call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("table", torch.ones(2))

    def forward(self, x):
        self.calls += 1
        self.table[0] = 2.0
        return self.linear(x).tanh() * self.table + 0 * self.calls


@pytest.mark.parametrize("kind", [Listed, Remembering])
def test_tensors_that_stand_elsewhere(kind):
    module = kind()
    # In torch a call changes the buffers; ours leaves them.
    module(batch_for()[0])
    model = adapter.from_module(module, loss=F.mse_loss, example=batch_for())
    before = state_of(module)
    cx.hessian(model, batch_for())
    assert same(before, state_of(module))
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    kind: str = "output"
    hidden: tuple = ()
    cache: object = None


class Objects(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        h = self.linear(x)
        return {"rest": [h.exp()], "out": Output(h.tanh(), hidden=(h, h.sin()), cache=object())}


def of_objects(outputs, targets):
    assert list(outputs) == ["rest", "out"]  # the module's order
    out = outputs["out"]
    assert isinstance(out, Output) and out.kind == "output"
    return F.mse_loss(out.logits * out.hidden[1] + outputs["rest"][0], targets)


def test_outputs_are_objects():
    module = Objects()
    model = adapter.from_module(module, loss=of_objects, example=batch_for())
    found = model.verify(hvp=True)
    assert max(found.outputs, found.loss, found.gradient, found.hvp) <= 1e-5, found
    outputs = model.forward(model.params, model.convert(batch_for()))
    assert outputs["out"].logits.shape == (6, 2) and outputs["out"].kind == "output"
    # J'MJ of all outputs: the Hessian less what the curvature of the outputs adds.
    op = cx.ggn(model, batch_for())
    params = {n: jnp.asarray(p) for n, p in model.params.items()}
    x, y = model.convert(batch_for())

    def parts(p):
        h = x @ p["linear.weight"].T + p["linear.bias"]
        return jnp.tanh(h), h, jnp.sin(h), jnp.exp(h)

    def loss(z):
        return jnp.mean((z[0] * z[2] + z[3] - y) ** 2)

    v = op.unravel(jnp.arange(10, dtype=jnp.float32))
    z, dz = jax.jvp(parts, (params,), (v,))
    wanted = jax.vjp(parts, params)[1](jax.jvp(jax.grad(loss), (z,), (dz,))[1])[0]
    np.testing.assert_allclose(op.ravel(op @ v), op.ravel(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_where_torch_has_no_second_derivative(sparse):
    if sparse:
        layer, x = nn.Embedding(5, 3, sparse=True), torch.tensor([[0, 1], [2, 2], [4, 0]])
    else:
        layer = nn.Sequential(nn.Linear(2, 3), Distances())
        x = torch.randn(3, 2, 2)
    module = nn.Sequential(layer, nn.Flatten(1), nn.Tanh(), nn.LazyLinear(2))
    module(x)
    batch = (x, torch.randn(3, 2))
    model = adapter.from_module(module, loss=F.mse_loss, example=batch)
    found = model.verify(hvp=True)
    assert found.gradient <= 1e-5 and found.hvp <= 1e-2
    if sparse:
        return
    assert found.reference == "central differences of torch's gradient"
    with pytest.raises(TypeError, match="torch cannot differentiate the loss twice"):
        adapter.double_backward(module, F.mse_loss, batch)


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x, torch.tensor([[0.5, 0.0, 1.0], [-1.0, 2.0, 0.0]]))


def test_a_first_batch_in_which_no_label_counts():
    x, y = torch.randn(6, 3), torch.tensor([-100, -100, -100, 1, 2, -100])
    module, loss = nn.Linear(3, 3), nn.CrossEntropyLoss()
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    eye = jnp.eye(12, dtype=jnp.float32)
    wanted = np.asarray(cx.hessian(adapter.from_module(module, loss=loss), (x, y)).product(eye))
    model = adapter.from_module(module, loss=loss, example=parts[0])
    with pytest.warns(UserWarning, match="0 on 1 of 2 batches"):
        ours = cx.hessian(model, parts)
    for op in (ours, adapter.double_backward(module, loss, parts)):
        np.testing.assert_allclose(op.product(eye), wanted, atol=1e-6)
    # It was compared on the second.
    assert model.verify().gradient <= 1e-5
    with pytest.raises(ValueError, match="verify needs a batch with a label that counts"):
        model.verify(parts[0])
    with pytest.raises(ValueError, match="at least one batch with a label that counts"):
        adapter.double_backward(module, loss, parts[:1])


def test_near_a_minimum_rounding_errors_are_no_difference():
    """Where residuals are rounding errors, so are loss and gradient, on either side."""
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    with torch.no_grad():
        y = module(x * (1 + 1e-7))
    model = adapter.from_module(module, loss=F.mse_loss, example=(x, y))
    assert model.verify(hvp=True).hvp <= 1e-5
