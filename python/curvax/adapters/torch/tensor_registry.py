"""How lowerings of torch's operations are handed to torchax."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from curvax.typing import PyTree

# Of JAX arrays, or of torchax's tensors, to one or several.
Lowering: TypeAlias = Callable[..., PyTree]


class Register(Protocol):
    """Takes the lowering of an operation."""

    def __call__(self, operation: Any, lowering: Lowering, *, view: bool = False) -> None:
        """See `register_in`."""
        ...


def register_in(torchax: ModuleType) -> Register:
    """The lowerings of torchax, to be replaced."""
    registry = torchax.ops.ops_registry

    def register(operation: Any, lowering: Lowering, *, view: bool = False) -> None:
        """Replace a lowering.

        Args:
            operation: of aten, all its overloads or one, or a function of torch.
            lowering: of JAX arrays; of torchax's tensors if `view`.
            view: whether it gets views as they are.
        """
        packet = isinstance(operation, torch._ops.OpOverloadPacket)
        entries = registry.all_aten_ops if packet or _is_overload(operation) else None
        if entries is None:
            entries = registry.all_torch_functions
        if packet:  # torchax prefers those of single overloads
            for name in operation.overloads():
                entries.pop(getattr(operation, name), None)
        entries[operation] = registry.Operator(
            torch_op=operation,
            func=lowering,
            is_jax_function=not view,
            is_user_defined=False,
            needs_env=False,
            is_view_op=view,
        )

    return register


def _is_overload(operation: object) -> bool:
    return isinstance(operation, torch._ops.OpOverload)


def unlisted(index: PyTree) -> PyTree:
    """An index without lists: JAX takes arrays alone."""
    if isinstance(index, list):
        # As torch tells a list of places from one of an index for each axis.
        if any(not isinstance(item, (bool, int)) for item in index):
            return tuple(map(unlisted, index))
        return np.asarray(index)
    return tuple(map(unlisted, index)) if isinstance(index, tuple) else index
