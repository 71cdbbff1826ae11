"""A torch module where it came from: its own outputs, loss and double backward."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvax.adapters.torch.bridge import batch_to_torch, raised_within, to_numpy
from curvax.adapters.torch.functional import Run
from curvax.adapters.torch.losses import check_scalar
from curvax.adapters.torch.modes import checkpoints_run_forward
from curvax.adapters.torch.structures import take_apart
from curvax.adapters.verification import SourceDerivatives, SourceValues
from curvax.checks import cut

Leaves = dict[str, torch.Tensor]
Objective = Callable[[nn.Module, Any], torch.Tensor]
"""`objective(module, batch) -> loss`, a scalar tensor."""


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Record gradients; compiled functions and reentrant checkpoints run as they were written.

    Neither has second derivatives otherwise.
    """
    eager = torch.compiler.set_stance("force_eager")
    with torch.enable_grad(), eager, checkpoints_run_forward():
        yield


@contextlib.contextmanager
def double_differentiable() -> Iterator[None]:
    """As `differentiable`, with attention of which torch has second derivatives on a CPU."""
    with differentiable(), sdpa_kernel(SDPBackend.MATH):
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


@contextlib.contextmanager
def explained(what: str, option: str, given: Any) -> Iterator[None]:
    """Say of an error of torch's own what it is about.

    Raises:
        ValueError: torch could not compute.
        TypeError: torch was given what it does not know.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        if not raised_within(error, "torch"):
            raise
        kind = TypeError if isinstance(error, (TypeError, AttributeError)) else ValueError
        shapes = jax.tree.map(lambda x: tuple(x.shape) if hasattr(x, "shape") else x, given)
        raise kind(
            f"{what} cannot be computed of this batch, of shapes {cut(str(shapes))}: "
            f"{type(error).__name__}: {error}. If it is to be given other parts of the batch, say "
            f"by {option} which"
        ) from error


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

    def evaluate(self, batch: Any) -> SourceValues:
        """See `Source`."""
        tensors = batch_to_torch(batch)
        parameters = self._parameters()
        with differentiable():
            with explained("the module", "inputs=", tensors):
                outputs = take_apart(self.run(self.module, tensors), to_numpy)
            with explained("the loss", "targets=", (outputs, tensors)):
                loss = self.objective(self.module, tensors)
            check_scalar(loss)
            gradient = _gradient(loss, parameters)
        return SourceValues(outputs, float(loss.detach()), _to_numpy(gradient))

    def derivatives(self, batch: Any, vector: Mapping[str, Any]) -> SourceDerivatives:
        """See `Source`."""
        parameters = self._parameters()
        direction = {name: torch.from_numpy(np.array(x)) for name, x in vector.items()}
        tensors = batch_to_torch(batch)

        def gradient() -> Leaves:
            with double_differentiable():
                return _gradient(self.objective(self.module, tensors), parameters)

        def differences() -> Mapping[str, Any]:
            return _to_numpy(_central_differences(gradient, parameters, direction))

        try:
            with double_differentiable():
                loss = self.objective(self.module, tensors)
                product = second_derivatives(loss, parameters)[1](direction)
        except (RuntimeError, NotImplementedError):
            # An operation of which torch has no second derivative.
            return SourceDerivatives(None, differences)
        return SourceDerivatives(_to_numpy(product), differences)

    def _parameters(self) -> Leaves:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def _gradient(loss: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> Leaves:
    leaves = list(parameters.values())
    if not loss.requires_grad:  # it depends on no parameter
        return {name: torch.zeros_like(leaf) for name, leaf in parameters.items()}
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def _to_numpy(leaves: Leaves) -> dict[str, Any]:
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
