"""How torch's functions behave in a conversion, and in the source that it is compared with."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from curvax.adapters.torch.bridge import torchax
from curvax.adapters.torch.environment import environment
from curvax.typing import PyTree


class AsInTorch(TorchFunctionMode):
    """What torchax does otherwise than torch.

    Gradients stop within `torch.no_grad()`; and "cpu", where the module believes itself to be, is
    where JAX's arrays are: torchax would leave JAX for it.
    """

    def __torch_function__(
        self,
        func: Callable[..., PyTree],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> PyTree:
        if torch.is_autocast_enabled("cpu"):
            raise torchax().tensor.OperatorNotFound("torch.autocast has no lowering")
        traced = (torchax().tensor.Tensor, torchax().view.View)
        if func in (torch.Tensor.cpu, torch.Tensor.contiguous) and isinstance(args[0], traced):
            return args[0]
        if func in (torch.autograd.grad, torch.Tensor.backward):
            raise torchax().tensor.OperatorNotFound(f"{func.__name__} has no lowering")
        given = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if func in _MADE_LIKE and torch.is_tensor(args[0]):
            func, args, given = _made_like(func, args, given)
        args, given = environment().exchange(func, tuple(map(_on_cpu, args)), given)
        out = func(*args, **given)
        if torch.is_grad_enabled() or environment().call.within_function:
            return out
        return torch.utils._pytree.tree_map_only(traced, lambda x: x.detach(), out)


# What makes a constant with the dtype of a tensor, and the function that needs no such tensor.
_MADE_LIKE = {
    torch.Tensor.new_tensor: torch.tensor,
    torch.Tensor.new_zeros: torch.zeros,
    torch.Tensor.new_ones: torch.ones,
    torch.Tensor.new_empty: torch.zeros,
    torch.Tensor.new_full: torch.full,
    torch.zeros_like: torch.zeros,
    torch.ones_like: torch.ones,
    torch.empty_like: torch.zeros,
    torch.full_like: torch.full,
}


def _made_like(
    func: Callable[..., PyTree], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Callable[..., torch.Tensor], tuple[object, ...], dict[str, object]]:
    like: torch.Tensor
    like, *rest = args
    if func.__name__.endswith("_like"):
        rest = [tuple(like.shape), *rest]
    kept = {name: value for name, value in kwargs.items() if name in ("size", "fill_value", "data")}
    dtype = kwargs.get("dtype")
    return _MADE_LIKE[func], tuple(rest), {**kept, "dtype": like.dtype if dtype is None else dtype}


def _on_cpu(argument: object) -> object:
    """Constants are made on the CPU, whatever device a traced tensor claims to be on."""
    on_jax = (isinstance(argument, torch.device) and argument.type == "jax") or (
        isinstance(argument, str) and argument.partition(":")[0] == "jax"
    )
    return torch.device("cpu") if on_jax else argument


@contextlib.contextmanager
def checkpoints_run_forward() -> Iterator[None]:
    """Run what a reentrant checkpoint holds, and store what it would compute again."""
    kept = checkpoint.CheckpointFunction

    class Forward:
        """In its place."""

        @staticmethod
        def apply(run: Callable[..., PyTree], preserve_rng_state: bool, *inputs: object) -> PyTree:
            return run(*inputs)

    checkpoint.CheckpointFunction = Forward  # type: ignore[assignment, misc]
    try:
        with warnings.catch_warnings():
            # It looks for gradients that torch records, and JAX's tensors have none.
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
            yield
    finally:
        checkpoint.CheckpointFunction = kept  # type: ignore[misc]


@contextlib.contextmanager
def functions_run_forward() -> Iterator[None]:
    """Differentiate what a `torch.autograd.Function` computes, in place of calling its backward.

    torch runs its forward without gradients. Whether the two agree, the comparison of gradients
    tells.
    """
    # Below `Function.apply` itself, which a module may have bound long before.
    base: Any = torch.autograd.function._SingleLevelFunction

    def apply(cls: Any, /, *args: object, **kwargs: object) -> PyTree:
        call = environment().call
        if not call.converting:
            return super(base, cls).apply(*args, **kwargs)
        outer, call.within_function = call.within_function, True
        try:
            with torch.enable_grad():
                return _forward(cls, args, kwargs)
        finally:
            call.within_function = outer

    call = environment().call
    outer, call.converting = call.converting, True
    base.apply = classmethod(apply)
    try:
        yield
    finally:
        call.converting = outer
        if not outer and "apply" in vars(base):
            del base.apply


def _forward(cls: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> PyTree:
    ctx = FunctionCtx()
    ctx.needs_input_grad = tuple(torch.is_tensor(x) for x in args)  # type: ignore[attr-defined]
    if cls.setup_context is torch.autograd.function._SingleLevelFunction.setup_context:
        out = cls.forward(ctx, *args, **kwargs)
    else:
        out = cls.forward(*args, **kwargs)
        cls.setup_context(ctx, args, out)
    fixed = getattr(ctx, "non_differentiable", ())
    if not fixed:
        return out
    return torch.utils._pytree.tree_map(
        lambda x: x.detach() if any(x is y for y in fixed) else x, out
    )


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
