"""A torch module where it came from: its own outputs, loss and double backward."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvax.adapters.torch.bridge import batch_to_torch, to_numpy
from curvax.adapters.torch.functional import Run

Objective = Callable[[nn.Module, Any], torch.Tensor]
"""`objective(module, batch) -> loss`, a scalar tensor."""


def hessian_products(
    loss: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The map `v -> H v` of a loss, by reverse over reverse differentiation (Pearlmutter 1994).

    The graph of the gradient is kept: each product is one pass backward through it.
    """
    names, leaves = list(parameters), list(parameters.values())
    gradients = torch.autograd.grad(
        loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True
    )

    def product(vector: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        terms = [(g * vector[name]).sum() for name, g in zip(names, gradients, strict=True)]
        along = torch.stack([term for term in terms if term.requires_grad] or terms[:1]).sum()
        if not along.requires_grad:  # a loss that is linear in all parameters
            return {name: torch.zeros_like(leaf) for name, leaf in parameters.items()}
        products = torch.autograd.grad(
            along, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(names, products, strict=True))

    return product


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

    def hessian_product(self, batch: Any, vector: Mapping[str, Any]) -> dict[str, Any]:
        """See `Source`."""
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        direction = {name: torch.from_numpy(np.array(x)) for name, x in vector.items()}
        # The fused attention of torch has no second derivative on a CPU.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = self.objective(self.module, batch_to_torch(batch))
            products = hessian_products(loss, parameters)(direction)
        return {name: x.detach().numpy() for name, x in products.items()}
