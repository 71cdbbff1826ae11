"""A torch module as a function of its parameters, run by JAX through torchax."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import torch
from torch import nn

from curvax.adapters.torch.bridge import (
    check_device,
    raised_within,
    to_jax,
    torchax,
)
from curvax.adapters.torch.checks import check_convertible
from curvax.adapters.torch.environment import environment
from curvax.adapters.torch.modes import AsInTorch, differentiable, functions_run_forward
from curvax.adapters.torch.state import holders, trainable
from curvax.adapters.torch.steps import StepsOfBatches
from curvax.adapters.torch.structures import take_apart
from curvax.typing import Batch, Params, PyTree

Run = Callable[[nn.Module, Batch], PyTree]
"""`run(module, batch) -> outputs`, on torch tensors."""


class TorchFunction:
    """`forward(params, batch)` of a module, on JAX arrays.

    Attributes:
        params: leaves by name, of the parameters that require a gradient.
        name_map: all names of those parameters to the names in `params`.
        steps: those that depend on a batch's values.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        check_convertible(module)
        self._run = run
        self._module = module
        taken = trainable(module)
        first = {id(p): name for name, p in taken.items()}
        self.name_map = {
            name: first[id(p)]
            for name, p in module.named_parameters(remove_duplicate=False)
            if id(p) in first
        }
        self.params = {name: to_jax(p, f"parameter {name!r}") for name, p in taken.items()}
        self.steps = StepsOfBatches()
        # The parameters themselves, to know them where a module holds them in a list or closure.
        self._taken = taken
        # Where the module's tensors stand: in a dict of a part, under a key. A tied parameter
        # stands in several places, under one name; what is no parameter has a constant.
        self._places: list[tuple[dict[str, torch.Tensor | None], str, str]] = []
        self._constants: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
        self._arrays: dict[int, jax.Array] = {}
        copies: dict[int, torch.Tensor] = {}
        for holder in holders(module):
            for key, tensor in holder.items():
                if id(tensor) in first:
                    self._places.append((holder, key, first[id(tensor)]))
                elif isinstance(tensor, torch.Tensor):
                    if id(tensor) not in copies:
                        copies[id(tensor)] = self._copy(tensor, f"the module's {key!r}")
                    self._constants.append((holder, key, copies[id(tensor)]))

    def _copy(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A copy that torch and JAX share; torch's side of it is never changed in a call."""
        check_device(tensor, name)
        to_jax(tensor.detach().reshape(-1)[:1], name)  # refuses what JAX cannot hold
        constant = tensor.detach().clone()
        if constant.ndim and constant.dtype in (torch.float32, torch.float64):
            self._arrays[id(constant)] = jnp.from_dlpack(constant.contiguous())
        return constant

    def __call__(self, params: Params, batch: Batch) -> PyTree:
        """The outputs; traceable by JAX.

        Raises:
            TypeError: torchax cannot run an operation; the message names it.
        """
        env = environment()
        tensors = {name: env.view(leaf) for name, leaf in params.items()}
        with lowered(), self._replaced(tensors):
            env.call.parameters = {id(p): tensors[name] for name, p in self._taken.items()}
            env.call.arrays = self._arrays
            env.call.following = self.steps.following(batch)
            outputs = self._run(self._module, jax.tree.map(env.view, batch))
            return env.guarded(take_apart(outputs, env.unview))

    @contextlib.contextmanager
    def _replaced(self, tensors: Mapping[str, PyTree]) -> Iterator[None]:
        """Replace the module's tensors by others, and leave no trace of that.

        Not `torch.func.functional_call`: it leaves the replacement in a part that has two names,
        and does not replace tensors that are plain attributes.
        """
        kept = [(holder, dict(holder)) for holder in holders(self._module)]
        try:
            for holder, key, name in self._places:
                holder[key] = tensors[name]
            for holder, key, value in self._constants:
                holder[key] = value
            yield
        finally:
            # What the module has stored on itself meanwhile is of JAX too.
            for holder, before in kept:
                holder.clear()
                holder.update(before)


@contextlib.contextmanager
def lowered() -> Iterator[None]:
    """Run torch's operations on JAX, and say of what it refuses which operation that is.

    Raises:
        TypeError: torchax cannot run an operation.
    """
    env = environment()
    # A key of our own: a draw within a trace would leave a tracer in that of the environment. The
    # numbers are then the same in every call.
    fixed = env.override_property(prng=jax.random.key(0, impl="threefry2x32"))
    try:
        with (
            torch.random.fork_rng(devices=[]),
            differentiable(),
            env,
            fixed,
            functions_run_forward(),
            AsInTorch(),
            warnings.catch_warnings(),
        ):
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
            f"what module or loss do depends on the values of tensors, as in `if x.sum() > 0` or "
            f".item(), or so does an operation as torchax has it ({_summary(error)}): {_FALLBACK}"
        ) from error
    except Exception as error:
        if not raised_within(error, "torchax", "jax", "torch"):
            raise
        raise TypeError(f"{type(error).__name__}: {_summary(error)}: {_FALLBACK}") from error
    finally:
        env.restore()


def _summary(error: Exception) -> str:
    return str(error).partition("\n")[0]


_FALLBACK = (
    "torchax cannot run this module on JAX. Let torch multiply by its own double backward instead: "
    "adapters.torch.double_backward(module, loss, batches)"
)
