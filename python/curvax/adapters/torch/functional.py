"""A torch module as a function of its parameters, run by JAX through torchax."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from curvax.adapters.torch.bridge import to_jax, torchax

Run = Callable[[nn.Module, Any], Any]
"""`run(module, batch) -> outputs`, on torch tensors."""


class TorchFunction:
    """`forward(params, batch)` of a module, on JAX arrays.

    Attributes:
        params: leaves by name, of the parameters that require a gradient.
        name_map: all names of those parameters to the names in `params`.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        self._run = run
        self._module = module
        taken = {name: p for name, p in module.named_parameters() if p.requires_grad}
        first = {id(p): name for name, p in taken.items()}
        self.name_map = {
            name: first[id(p)]
            for name, p in module.named_parameters(remove_duplicate=False)
            if id(p) in first
        }
        self.params = {name: to_jax(p, f"parameter {name!r}") for name, p in taken.items()}
        # Where the module's tensors stand: in a dict of a part, under a key. A tied parameter
        # stands in several places, under one name; what is no parameter has a constant.
        self._places: list[tuple[dict[str, Any], str, str]] = []
        self._constants: list[tuple[dict[str, Any], str, Any]] = []
        for part in module.modules():
            for holder in (part._parameters, part._buffers, vars(part)):
                for key, tensor in holder.items():
                    if id(tensor) in first:
                        self._places.append((holder, key, first[id(tensor)]))
                    elif isinstance(tensor, torch.Tensor):
                        name = f"{key!r} of {type(part).__name__}"
                        self._constants.append((holder, key, to_jax(tensor, name)))

    def __call__(self, params: Any, batch: Any) -> Any:
        """The outputs; traceable by JAX.

        Raises:
            TypeError: torchax has no lowering of an operation; the message names it.
        """
        view, jax_view = torchax().interop.torch_view, torchax().interop.jax_view
        with lowered(), self._replaced({name: view(leaf) for name, leaf in params.items()}):
            return jax.tree.map(jax_view, self._run(self._module, jax.tree.map(view, batch)))

    @contextlib.contextmanager
    def _replaced(self, tensors: Mapping[str, Any]) -> Iterator[None]:
        """Replace the module's tensors by others, and leave no trace of that.

        Not `torch.func.functional_call`: it leaves the replacement in a part that has two names,
        and does not replace tensors that are plain attributes.
        """
        parts = list(self._module.modules())
        holders = [h for part in parts for h in (part._parameters, part._buffers, vars(part))]
        kept = [(holder, dict(holder)) for holder in holders]
        try:
            for holder, key, name in self._places:
                holder[key] = tensors[name]
            for holder, key, value in self._constants:
                holder[key] = torchax().interop.torch_view(value)
            yield
        finally:
            # What the module has stored on itself meanwhile is of JAX too.
            for holder, before in kept:
                holder.clear()
                holder.update(before)


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
        with torch.enable_grad(), env, fixed, _AsInTorch(), warnings.catch_warnings():
            # torch's integers have 64 bits wherever torchax does not ask JAX.
            narrowed = "Explicitly requested dtype int64"
            warnings.filterwarnings("ignore", message=narrowed, category=UserWarning)
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
