"""`from_module`: any torch module whose operations torchax can lower."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from curvax.adapters.adapted import AdaptedModel
from curvax.adapters.batches import first, second
from curvax.adapters.torch.bridge import batch_to_jax, batch_to_torch
from curvax.adapters.torch.checks import check_example, check_module, explained
from curvax.adapters.torch.functional import Run, TorchFunction
from curvax.adapters.torch.losses import LossThroughTorchax, TorchLoss, loss_on_jax
from curvax.adapters.torch.modes import differentiable
from curvax.adapters.torch.source import Objective, TorchSource
from curvax.adapters.torch.state import preserved, trainable
from curvax.adapters.torch.steps import Recording
from curvax.options import takes_options

_DOUBLE = "adapters.torch.double_backward(module, loss, batches)"
HINT = (
    " Does the module draw random numbers, or change its state in a call? Otherwise this is a "
    f"defect of the conversion: let torch multiply, by {_DOUBLE}"
)
DERIVATIVE_HINT = (
    " Where a backward of the module (of a torch.autograd.Function, or by a hook) is on purpose "
    "not the derivative of its forward, as in straight-through rounding and scaled gradients, the "
    f"Hessian that torch sees is that of double_backward, which multiplies in torch: {_DOUBLE}"
)


@takes_options()
def from_module(
    module: nn.Module,
    *,
    loss: TorchLoss,
    example: Any = None,
    inputs: Callable[[Any], Any] = first,
    targets: Callable[[Any], Any] = second,
) -> AdaptedModel:
    """A torch module and its loss as a model that JAX runs and differentiates.

    The module's operations are run by JAX (torchax). Its parameters that require a gradient become
    `params`, under their names in the module, as copies; tied ones are one leaf. Other parameters
    and buffers are constants. Operators take the batches as torch has them, a `DataLoader` too.

    Args:
        module: float32 or float64, on the CPU, without active dropout and with batch normalisation
            in evaluation mode, as by `module.eval()`.
        loss: `loss(outputs, targets)` on torch tensors, a mean over the batch. `CrossEntropyLoss`
            and `MSELoss` become the fused ones of `curvax.losses`; others are run by JAX as the
            module is.
        example: a batch to compare the module with its conversion on, now; None to compare on the
            first batch that an operator is made of.
        inputs: gets out of a batch what the module is called with: a tensor, a tuple of arguments
            or a mapping of keywords.
        targets: gets out of a batch the second argument of the loss.

    Returns:
        The model, with `verify(hvp=True)`.

    Raises:
        TypeError: not a module or one of `torch.jit`, a loss that is not callable, parameters that
            are not float32 or float64 or are quantized, an operation that torchax has no lowering
            of or JAX no second derivative, or steps that depend on the parameters' values.
        ValueError: active dropout, batch normalisation in train mode, parameters that are NaN or
            on another device, float64 with JAX's 64-bit mode off, a loss whose reduction is not
            the mean, a batch that module or loss cannot take, or a conversion that does not
            compute the module's outputs, loss or gradient (`VerificationError`).
        ImportError: torchax is not installed.
    """
    check_module(module)

    def run(module: nn.Module, batch: Any) -> Any:
        return call(module, inputs(batch))

    def objective(module: nn.Module, batch: Any) -> torch.Tensor:
        return loss(run(module, batch), targets(batch))

    return adapt(module, run, objective, loss_on_jax(loss, targets), example, traced=objective)


def call(module: nn.Module, inputs: Any) -> Any:
    """Call a module with a tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


def adapt(
    module: nn.Module,
    run: Run,
    objective: Objective,
    loss: Callable[[Any, Any], Any],
    example: Any,
    convert: Callable[[Any], Any] = batch_to_jax,
    traced: Run | None = None,
) -> AdaptedModel:
    """The model of a module that has been checked, compared on `example` if there is one.

    Args:
        module: the module.
        run: its outputs, on torch tensors.
        objective: its loss, on torch tensors.
        loss: the same of the outputs, on JAX arrays.
        example: a batch or None.
        convert: turns a batch into a pytree of JAX arrays.
        traced: what torch computes of every batch, to refuse what JAX would not, as labels out of
            range, and to learn the steps that JAX is to take; so not the source's own way where
            `run` has another. None for `run`.
    """
    check_example(example)
    traced = run if traced is None else traced
    forward = TorchFunction(module, run)
    if isinstance(loss, LossThroughTorchax):
        loss.steps = forward.steps

    def admit(batch: Any) -> None:
        recording = Recording(trainable(module).values())
        named = explained("the module or its loss", "inputs= and targets=", batch)
        with named, preserved(module), differentiable(), recording:
            traced(module, batch_to_torch(batch))
        forward.steps.admit(batch, recording.steps())

    model = AdaptedModel(
        forward.params,
        forward,
        loss,
        forward.name_map,
        source=TorchSource(module, run, objective),
        convert=convert,
        hint=HINT,
        derivative_hint=DERIVATIVE_HINT,
        admit=admit,
    )
    if example is not None:
        model.compared(model.convert(example))
    return model
