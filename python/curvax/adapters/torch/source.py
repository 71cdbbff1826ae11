"""A torch module where it came from: its own outputs, loss and double backward."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from curvax.adapters.torch.bridge import batch_to_torch, to_numpy
from curvax.adapters.torch.checks import explained
from curvax.adapters.torch.functional import Run
from curvax.adapters.torch.losses import check_scalar
from curvax.adapters.torch.modes import differentiable, double_differentiable
from curvax.adapters.torch.state import preserved, trainable
from curvax.adapters.torch.structures import take_apart
from curvax.adapters.verification import SourceDerivatives, SourceValues
from curvax.typing import Batch, PyTree

Leaves = dict[str, torch.Tensor]
Objective = Callable[[nn.Module, Batch], torch.Tensor]
"""`objective(module, batch) -> loss`, a scalar tensor."""


def second_derivatives(
    loss: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> tuple[Leaves, Callable[[Mapping[str, torch.Tensor]], Leaves]]:
    """The gradient of a loss and the map `v -> H v`, by reverse over reverse differentiation.

    The graph of the gradient is kept: each product is one pass backward through it
    (Pearlmutter 1994).
    """
    leaves = list(parameters.values())
    gradients = torch.autograd.grad(
        loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True
    )
    gradient = dict(zip(parameters, gradients, strict=True))

    def product(vector: Mapping[str, torch.Tensor]) -> Leaves:
        with torch.enable_grad():
            terms = [(g * vector[name]).sum() for name, g in gradient.items() if g.requires_grad]
            along = torch.stack(terms).sum() if terms else None
        if along is None:  # a loss that is linear in all parameters
            return {name: torch.zeros_like(leaf) for name, leaf in parameters.items()}
        products = torch.autograd.grad(
            along, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(parameters, products, strict=True))

    return gradient, product


class TorchSource:
    """See `curvax.adapters.adapted.Source`.

    Attributes:
        framework: for messages.
    """

    framework = "torch"

    def __init__(self, module: nn.Module, run: Run, objective: Objective) -> None:
        self.module = module
        self.run = run
        self.objective = objective

    def evaluate(self, batch: Batch) -> SourceValues:
        """See `Source`."""
        parameters = trainable(self.module)
        with preserved(self.module), differentiable():
            # Each of tensors of its own: a module may change its inputs.
            with explained("the module", "inputs=", batch):
                outputs = take_apart(self.run(self.module, batch_to_torch(batch)), to_numpy)
            with explained("the loss", "targets=", (outputs, batch)):
                loss = self.objective(self.module, batch_to_torch(batch))
            check_scalar(loss)
            gradient = _gradient(loss, parameters)
        return SourceValues(outputs, float(loss.detach()), _to_numpy(gradient))

    def derivatives(self, batch: Batch, vector: Mapping[str, PyTree]) -> SourceDerivatives:
        """See `Source`."""
        parameters = trainable(self.module)
        direction = {name: torch.from_numpy(np.array(x)) for name, x in vector.items()}

        def gradient() -> Leaves:
            with preserved(self.module), double_differentiable():
                return _gradient(self.objective(self.module, batch_to_torch(batch)), parameters)

        def differences() -> Mapping[str, PyTree]:
            return _to_numpy(_central_differences(gradient, parameters, direction))

        try:
            with preserved(self.module), double_differentiable():
                loss = self.objective(self.module, batch_to_torch(batch))
                product = _to_numpy(second_derivatives(loss, parameters)[1](direction))
        except (RuntimeError, NotImplementedError):
            # An operation of which torch has no second derivative.
            return SourceDerivatives(None, differences)
        if not all(np.isfinite(leaf).all() for leaf in product.values()):
            # One of which it has a wrong one, as of the norm of a row of zeros.
            return SourceDerivatives(None, differences)
        return SourceDerivatives(product, differences)


def _gradient(loss: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> Leaves:
    leaves = list(parameters.values())
    if not loss.requires_grad:  # it depends on no parameter
        return {name: torch.zeros_like(leaf) for name, leaf in parameters.items()}
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def _to_numpy(leaves: Leaves) -> dict[str, np.ndarray]:
    return {name: to_numpy(leaf) for name, leaf in leaves.items()}


def _central_differences(
    gradient: Callable[[], Leaves], parameters: Leaves, direction: Leaves
) -> Leaves:
    """Of a gradient at the parameters, which are moved meanwhile."""
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    scale, length = (
        torch.stack([x.square().sum() for x in leaves.values()]).sum().sqrt()
        for leaves in (kept, direction)
    )
    # Where the error of the second term, h², meets that of rounding, eps / h.
    eps = max(torch.finfo(p.dtype).eps for p in kept.values())
    step = eps ** (1 / 3) * max(1.0, float(scale)) / float(length)

    def at(sign: float) -> Leaves:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name] + sign * step * direction[name])
        return {name: g.detach() for name, g in gradient().items()}

    try:
        ahead, behind = at(1.0), at(-1.0)
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name])
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in ahead}
