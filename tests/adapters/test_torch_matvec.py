"""Torch functions as operators."""

import jax
import numpy as np
import pytest

import curvax as cx

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from curvax.adapters import torch as adapter  # noqa: E402

pytestmark = pytest.mark.frameworks


def spectrum(n):
    """A symmetric matrix with eigenvalues n, n - 1, ..., 1, the last one negative."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    values = np.arange(n, 0, -1.0)
    values[-1] = -n / 2
    return (q * values) @ q.T, values


@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_torch_matrix_under_the_block_solver(n, dtype):
    matrix, values = spectrum(n)
    with jax.enable_x64(dtype is torch.float64):
        a = torch.from_numpy(matrix).to(dtype)
        op = adapter.from_matvec(lambda v: a @ v, torch.empty(n, dtype=dtype))
        k = min(3, n)
        result = cx.eigsh(op, k, which="LA", tol=1e-5, block_size=min(2, n), seed=0)
        assert result.all_converged
        np.testing.assert_allclose(result.eigenvalues, values[:k], rtol=1e-5)
        exact = float(np.trace(matrix))
        assert abs(cx.trace(op, num_matvecs=n).estimate - exact) <= 1e-5 * n * abs(values).max()


def test_an_integer_means_one_float32_tensor():
    a = torch.diag(torch.arange(1.0, 6.0))
    op = adapter.from_matvec(lambda v: a @ v, 5)
    np.testing.assert_allclose(cx.diagonal(op, num_matvecs=5).estimate, np.arange(1.0, 6.0), 1e-6)


def test_what_torch_is_given_it_may_change():
    def doubled(v):
        return v.mul_(2)

    op = adapter.from_matvec(doubled, 4)
    x = jax.numpy.ones(4)
    np.testing.assert_array_equal(op @ x, np.full(4, 2.0))
    np.testing.assert_array_equal(x, np.ones(4))


class Branching(nn.Module):
    """What no conversion can trace."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.linear(x))
        return self.head(x if x.sum() > 0 else -x)


def test_double_backward_of_a_module_that_cannot_be_converted():
    module, loss = Branching(), nn.CrossEntropyLoss()
    x, y = torch.randn(9, 4), torch.randint(0, 3, (9,))
    op = adapter.double_backward(module, loss, [(x[:5], y[:5]), (x[5:], y[5:])])
    parameters = dict(module.named_parameters())
    names = sorted(parameters)

    def total(*leaves):
        named = dict(zip(names, leaves, strict=True))
        parts = [
            (len(b), loss(torch.func.functional_call(module, named, (a,)), b))
            for a, b in ((x[:5], y[:5]), (x[5:], y[5:]))
        ]
        return sum(weight * value for weight, value in parts) / 9

    leaves = tuple(parameters[name].detach() for name in names)
    blocks = torch.autograd.functional.hessian(total, leaves)
    sizes = [leaf.numel() for leaf in leaves]
    dense = np.block(
        [
            [np.asarray(blocks[i][j]).reshape(sizes[i], sizes[j]) for j in range(len(names))]
            for i in range(len(names))
        ]
    )
    values = np.linalg.eigvalsh(dense.astype(np.float64))
    result = cx.eigsh(op, 4, which="BE", tol=1e-5, seed=0)
    wanted = np.r_[values[::-1][:2], values[1::-1]]
    np.testing.assert_allclose(result.eigenvalues, wanted, atol=1e-5 * abs(values).max())
    assert set(result.eigenvectors) == set(names)


def test_parameters_that_the_loss_does_not_use_or_is_linear_in():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.a(x)

    module = Unused()
    batch = (torch.randn(5, 3), torch.randn(5, 1))
    op = adapter.double_backward(module, F.mse_loss, batch)
    ones = jax.tree.map(jax.numpy.ones_like, op.unravel(jax.numpy.zeros(op.shape[0])))
    assert not np.any((op @ ones)["b.weight"]) and np.any((op @ ones)["a.weight"])
    linear = adapter.double_backward(module, lambda out, y: out.mean(), batch)
    assert not np.any(linear.ravel(linear @ ones))


class TestBadInput:
    def test_arguments(self):
        with pytest.raises(TypeError, match="matvec must be callable, got int"):
            adapter.from_matvec(3, 4)
        with pytest.raises(TypeError, match="like must be an integer n, a torch tensor"):
            adapter.from_matvec(lambda v: v, {"a": np.ones(3)})
        with pytest.raises(TypeError, match="like must .*float"):
            adapter.from_matvec(lambda v: v, torch.ones(3, dtype=torch.int32))
        for like in (0, -1, torch.empty(0)):
            with pytest.raises(ValueError, match="at least 1|at least one element"):
                adapter.from_matvec(lambda v: v, like)
        with pytest.raises(ValueError, match="64-bit"):
            adapter.from_matvec(lambda v: v, torch.ones(3).double())

    @pytest.mark.parametrize(
        "matvec,error,match",
        [
            (lambda v: v[:2], ValueError, r"expected .*\(3,\).*got .*\(2,\)"),
            (lambda v: [v], ValueError, "structure and shapes"),
            (lambda v: v.numpy(), TypeError, "must return torch tensors on the CPU, got ndarray"),
            (lambda v: v.to("meta"), TypeError, r"got device meta: add \.cpu\(\)"),
            (lambda v: 1 / 0, ZeroDivisionError, "division"),
        ],
    )
    def test_what_the_function_returns(self, matvec, error, match):
        with pytest.raises(error, match=match):
            cx.eigsh(adapter.from_matvec(matvec, 3), 1)

    def test_an_asymmetric_product(self):
        a = torch.randn(40, 40)
        with pytest.raises(ValueError, match="symmetric"):
            cx.eigsh(adapter.from_matvec(lambda v: a @ v, 40), 2)

    def test_a_loss_that_is_not_finite(self):
        batch = (torch.full((2, 4), float("nan")), torch.randn(2, 3))
        with pytest.raises(FloatingPointError, match="the loss is nan on batch 0"):
            adapter.double_backward(nn.Linear(4, 3), F.mse_loss, batch)
        with pytest.raises(ValueError, match="at least one batch"):
            adapter.double_backward(nn.Linear(4, 3), F.mse_loss, [])
