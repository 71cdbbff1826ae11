"""A torch module as a function of its parameters, run by JAX through torchax."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from curvax.adapters.torch.bridge import to_jax, torchax

Run = Callable[[nn.Module, Any], Any]
"""`run(module, batch) -> outputs`, on torch tensors."""


class _Runner(nn.Module):
    """Calls `run` on a module, as a module: what `functional_call` can call."""

    def __init__(self, module: nn.Module, run: Run) -> None:
        super().__init__()
        self.module = module
        self.run = run

    def forward(self, batch: Any) -> Any:
        return self.run(self.module, batch)


class TorchFunction:
    """`forward(params, batch)` of a module, on JAX arrays.

    Attributes:
        params: leaves by name, of the parameters that require a gradient.
        name_map: all names of those parameters to the names in `params`.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        self._runner = _Runner(module, run)
        taken = {name: p for name, p in module.named_parameters() if p.requires_grad}
        first = {id(p): name for name, p in taken.items()}
        self.name_map = {
            name: first[id(p)]
            for name, p in module.named_parameters(remove_duplicate=False)
            if id(p) in first
        }
        self.params = {name: to_jax(p, f"parameter {name!r}") for name, p in taken.items()}
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._fixed = {
            name: to_jax(tensor, f"buffer {name!r}")
            for name, tensor in {**frozen, **dict(module.named_buffers())}.items()
        }
        self._unregistered = [
            (part, key, to_jax(value, f"tensor {key!r}"))
            for part in module.modules()
            for key, value in vars(part).items()
            if isinstance(value, torch.Tensor)
        ]

    def __call__(self, params: Any, batch: Any) -> Any:
        """The outputs; traceable by JAX.

        Raises:
            TypeError: torchax has no lowering of an operation; the message names it.
        """
        view = torchax().interop.torch_view
        tensors = {f"module.{name}": view(x) for name, x in {**self._fixed, **params}.items()}
        with lowered(), self._attributes():
            outputs = torch.func.functional_call(
                self._runner, tensors, (jax.tree.map(view, batch),)
            )
            return jax.tree.map(torchax().interop.jax_view, outputs)

    @contextlib.contextmanager
    def _attributes(self) -> Iterator[None]:
        """Replace the tensors that are plain attributes of modules, which torch does not."""
        kept = [(part, key, vars(part)[key]) for part, key, _ in self._unregistered]
        try:
            for part, key, value in self._unregistered:
                vars(part)[key] = torchax().interop.torch_view(value)
            yield
        finally:
            for part, key, tensor in kept:
                vars(part)[key] = tensor


class _AsInTorch(TorchFunctionMode):
    """What torchax does otherwise than torch.

    Gradients stop within `torch.no_grad()`; and "cpu", where the module believes itself to be, is
    where JAX's arrays are: torchax would leave JAX for it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            return args[0]
        given = {name: _on_jax(value) for name, value in (kwargs or {}).items()}
        out = func(*map(_on_jax, args), **given)
        if torch.is_grad_enabled():
            return out
        tensor = torchax().tensor.Tensor
        return torch.utils._pytree.tree_map_only(tensor, lambda x: x.detach(), out)


def _on_jax(argument: Any) -> Any:
    on_cpu = (isinstance(argument, torch.device) and argument.type == "cpu") or (
        isinstance(argument, str) and argument == "cpu"
    )
    return torch.device("jax") if on_cpu else argument


@contextlib.contextmanager
def lowered() -> Iterator[None]:
    """Run torch's operations on JAX, and say of what it refuses which operation that is."""
    env = torchax().default_env()
    # A key of our own: a draw within a trace would leave a tracer in that of the environment. The
    # numbers are then the same in every call.
    fixed = env.override_property(prng=jax.random.key(0, impl="threefry2x32"))
    try:
        with torch.enable_grad(), env, fixed, _AsInTorch():
            yield
    except torchax().tensor.OperatorNotFound as error:
        raise TypeError(f"{error}: {_FALLBACK}") from error
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.NonConcreteBooleanIndexError,
    ) as error:
        raise TypeError(
            f"what the module does depends on the values of its tensors, as in `if x.sum() > 0` or "
            f".item(), or so does an operation as torchax has it ({_summary(error)}): {_FALLBACK}"
        ) from error


def _summary(error: Exception) -> str:
    return str(error).partition("\n")[0]


_FALLBACK = (
    "torchax cannot run this module on JAX. Let torch multiply by its own double backward instead: "
    "adapters.torch.double_backward(module, loss, batches)"
)
