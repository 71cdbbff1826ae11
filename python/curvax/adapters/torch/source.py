"""A torch module where it came from: its own outputs, loss and double backward."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvax.adapters.torch.bridge import batch_to_torch, to_numpy
from curvax.adapters.torch.functional import Run

Leaves = dict[str, torch.Tensor]
Objective = Callable[[nn.Module, Any], torch.Tensor]
"""`objective(module, batch) -> loss`, a scalar tensor."""


@contextlib.contextmanager
def double_differentiable() -> Iterator[None]:
    """Record gradients, through attention of which torch has second derivatives on a CPU."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


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
        terms = [(g * vector[name]).sum() for name, g in gradient.items() if g.requires_grad]
        if not terms:  # a loss that is linear in all parameters
            return {name: torch.zeros_like(leaf) for name, leaf in parameters.items()}
        products = torch.autograd.grad(
            torch.stack(terms).sum(),
            leaves,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
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

    def evaluate(self, batch: Any) -> tuple[Any, float]:
        """See `Source`."""
        tensors = batch_to_torch(batch)
        with torch.no_grad():
            loss = self.objective(self.module, tensors)
            return to_numpy(self.run(self.module, tensors)), float(loss)

    def derivatives(
        self, batch: Any, vector: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `Source`."""
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        direction = {name: torch.from_numpy(np.array(x)) for name, x in vector.items()}
        with double_differentiable():
            gradient, product = second_derivatives(
                self.objective(self.module, batch_to_torch(batch)), parameters
            )
            return to_numpy(gradient), to_numpy(product(direction))
