"""Torch functions as operators: the solvers run on JAX, the products in torch."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from curvax.adapters.batches import first, second
from curvax.adapters.torch.checks import check_module
from curvax.adapters.torch.losses import TorchLoss, check_loss, check_scalar, weight_of
from curvax.adapters.torch.modes import double_differentiable
from curvax.adapters.torch.module import call
from curvax.adapters.torch.source import second_derivatives
from curvax.adapters.torch.state import trainable
from curvax.checks import is_integer, shown
from curvax.operators.conversion import HostOperator, HostProducts
from curvax.operators.vectors import space_like
from curvax.options import takes_options


class TorchProducts(HostProducts):
    """The products of a torch function with the rows of a block; arrays cross by DLPack."""

    def __init__(self, matvec: Callable[[Any], Any], like: Any) -> None:
        super().__init__(matvec)
        self.like = like

    def __call__(self, block: Any) -> Any:
        """Multiply `(b, n)`, row by row."""
        # A copy: what torch is given, it may change in place.
        rows = torch.from_dlpack(jnp.asarray(block)).clone()
        try:
            return np.stack([np.from_dlpack(self._one(row)) for row in rows])
        except Exception as error:
            self.error = error
            raise

    def _one(self, row: torch.Tensor) -> torch.Tensor:
        leaves, treedef = jax.tree.flatten(self.like)
        pieces = row.split([math.prod(leaf.shape) for leaf in leaves])
        vector = [
            piece.reshape(leaf.shape).to(leaf.dtype)
            for piece, leaf in zip(pieces, leaves, strict=True)
        ]
        result = self.matrix(jax.tree.unflatten(treedef, vector))
        products = jax.tree.leaves(result)
        structure: Any = jax.tree.structure(result)
        wanted = [tuple(leaf.shape) for leaf in leaves]
        shapes = [tuple(getattr(x, "shape", ())) for x in products]
        if structure != treedef or shapes != wanted:
            raise ValueError(
                "matvec must return the structure and shapes of its argument: expected "
                f"{treedef} {wanted}, got {structure} {shapes}"
            )
        for product in products:
            if not isinstance(product, torch.Tensor) or product.device.type != "cpu":
                tensor = isinstance(product, torch.Tensor)
                got = f"device {product.device}: add .cpu()" if tensor else type(product).__name__
                raise TypeError(f"matvec must return torch tensors on the CPU, got {got}")
            if product.is_complex():
                raise TypeError(f"matvec must return real tensors, got dtype {product.dtype}")
        return torch.cat([product.detach().to(row.dtype).reshape(-1) for product in products])


def from_matvec(matvec: Callable[[Any], Any], like: Any) -> HostOperator:
    """A torch function that multiplies by a symmetric matrix, as an operator.

    Any estimator and solver takes it: it makes curvax the backend of another torch library.

    Args:
        matvec: maps torch tensors on the CPU to tensors of the same structure and shapes. Each
            call multiplies one vector.
        like: what the vectors look like: an integer n for one float32 tensor of shape (n,), a
            tensor, or tensors in lists, tuples and dicts, such as
            `dict(module.named_parameters())`.

    Returns:
        The operator; its vectors are JAX arrays, with the structure of `like`. It cannot be used
        within `jax.grad`, since JAX does not see into torch. float64 if any tensor of `like` is.

    Raises:
        TypeError: `matvec` is not callable, or `like` holds something else than real floating
            tensors. Later: what `matvec` returns is not a tensor on the CPU.
        ValueError: `like` has no element, or is float64 with JAX's 64-bit mode off. Later: what
            `matvec` returns has another structure or other shapes.
    """
    if not callable(matvec):
        raise TypeError(f"matvec must be callable, got {type(matvec).__name__}")
    if is_integer(like):
        like = torch.empty(space_like(like).n, device="meta")
    for leaf in jax.tree.leaves(like):
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(
                "like must be an integer n, a torch tensor, or tensors in lists, tuples and dicts; "
                f"got {shown(leaf)}"
            )
    shapes = jax.tree.map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), like)
    return HostOperator(TorchProducts(matvec, shapes), space_like(jax.tree.map(_described, shapes)))


def _differentiated(loss: torch.Tensor, parameters: dict[str, torch.Tensor]) -> Any:
    """The map `v -> H v`.

    Raises:
        TypeError: torch has no second derivative of an operation.
    """
    try:
        product = second_derivatives(loss, parameters)[1]
        product({name: torch.zeros_like(p) for name, p in parameters.items()})
    except RuntimeError as error:
        raise TypeError(
            f"torch cannot differentiate the loss twice ({error}): write the operation in others, "
            "or take differences, by from_module and hessian(..., method='finite_difference')"
        ) from error
    return product


def _described(leaf: torch.Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))


@takes_options()
def double_backward(
    module: nn.Module,
    loss: TorchLoss,
    batches: Any,
    *,
    inputs: Callable[[Any], Any] = first,
    targets: Callable[[Any], Any] = second,
) -> HostOperator:
    """The Hessian of a torch module's mean loss, multiplied by torch's own double backward.

    What `from_module` cannot convert is analysed so: slower, without Gauss-Newton and Fisher
    matrices, but whatever the module's operations are. The graphs of all batches' gradients are
    kept.

    Args:
        module: as for `from_module`.
        loss: as for `from_module`; any callable.
        batches: one batch (a tuple, a mapping or a tensor), or a list or loader of batches. They
            are weighted by the lengths of the leading axes of the targets; for `CrossEntropyLoss`
            and `NLLLoss` by what these divide by, the weights of the labels that count.
        inputs: as for `from_module`.
        targets: as for `from_module`.

    Returns:
        The operator; its vectors are dicts of JAX arrays by the names of the parameters.

    Raises:
        TypeError: as for `from_module`.
        ValueError: as for `from_module`, or no batch in which a label counts.
        FloatingPointError: the loss is not finite.
    """
    check_module(module)
    check_loss(loss)
    single = isinstance(batches, (tuple, Mapping, torch.Tensor))
    listed: Iterable[Any] = [batches] if single else batches
    parameters = trainable(module)
    parts = []
    with double_differentiable():
        for position, batch in enumerate(listed):
            weight = float(weight_of(loss, targets(batch)))
            if weight == 0:  # no label counts, and the mean over none is NaN
                continue
            value = loss(call(module, inputs(batch)), targets(batch))
            check_scalar(value)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the loss is {value.item()} on batch {position}")
            parts.append((weight, _differentiated(value, parameters)))
    if not parts:
        raise ValueError("batches must hold at least one batch with a label that counts, got none")
    total = sum(weight for weight, _ in parts)

    def matvec(vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for weight, product in parts:
            for name, x in product(vector).items():
                out[name] += x * (weight / total)
        return out

    return from_matvec(matvec, parameters)
