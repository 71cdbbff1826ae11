"""The world in which a module is run on JAX: torchax, mended where it differs from torch.

Two kinds of tensors meet there. *Traced* ones hold JAX arrays: the parameters, the batch, and what
is computed from them. All others are *constants*: buffers, frozen parameters, and what a module
makes as it runs (`torch.arange`, masks, tensors in lists and closures). torch itself computes with
constants, so that steps that depend on their values can be taken; one that meets a traced tensor
becomes an array, and one that a traced tensor is written into becomes traced itself, with all
other tensors that see the same memory.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils import _pytree

from curvax.adapters.torch.bridge import to_jax as copied
from curvax.adapters.torch.bridge import torchax, wide
from curvax.adapters.torch.steps import Following, Steps, looks, writes
from curvax.typing import DTypeLike, PyTree


class Call(threading.local):
    """What one call of a module knows; empty between calls.

    Attributes:
        parameters: by `id`, the traced tensors that stand for the parameters of the module.
        arrays: by `id`, the arrays of the module's constants.
        written: by storage, the constants that a traced tensor was written into.
        saved: by storage, what constants held that the module has changed.
        following: the steps that depend on the batch.
        converting: whether there is one.
        within_function: whether the forward of a `torch.autograd.Function` runs.
    """

    def __init__(self) -> None:
        self.converting = self.within_function = False
        self.parameters: Mapping[int, torch.Tensor] = {}
        self.arrays: Mapping[int, jax.Array] = {}
        self.written: dict[int, tuple[torch.Tensor, jax.Array]] = {}
        self.following = Following(Steps({}))
        self.saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


@functools.cache
def environment() -> Any:
    """The one environment of all modules."""
    tensor, view = torchax().tensor, torchax().view
    traced = (tensor.Tensor, view.View)

    class Environment(tensor.Environment):  # type: ignore[misc, name-defined]
        """torchax's, with constants."""

        def __init__(self) -> None:
            super().__init__()
            self.call = Call()

        def dispatch(
            self,
            func: Callable[..., PyTree],
            types: object,
            args: tuple[object, ...],
            kwargs: dict[str, object],
        ) -> PyTree:
            kwargs = kwargs or {}
            leaves = [x for x in _pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
            if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in leaves):
                raise tensor.OperatorNotFound("a transformation of torch.func has no lowering")
            constants = [x for x in leaves if not isinstance(x, traced)]
            if len(constants) == len(leaves) and (_stays(func) or not self._met(constants)):
                self._save(func, args, kwargs)
                if kwargs.get("device") is not None:  # a traced tensor's, which is nowhere
                    kwargs = {**kwargs, "device": torch.device("cpu")}
                return func(*args, **kwargs)
            if func in (torch.tensor, torch.as_tensor):
                return self._made_of(func, *args, **kwargs)  # type: ignore[arg-type]
            if constants and func not in tensor.TENSOR_CONSTRUCTORS and not _is_cast(func):
                self._get_op_or_decomp(func)  # or torch takes the function apart
                return self._meet(func, types, args, kwargs)
            return super().dispatch(func, types, args, kwargs)

        def exchange(
            self, func: Callable[..., PyTree], args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            """The arguments of one of torch's functions, traced all if one of them is.

            Those that it writes into are left. torch refuses arguments on different devices before
            it takes a function apart, and traced tensors are on none.
            """
            parameters = self.call.parameters
            if looks(func, args, kwargs):
                args, kwargs = self.call.following.taken(func, args, kwargs, traced)
            args, kwargs = _pytree.tree_map_only(
                torch.Tensor, lambda x: parameters.get(id(x), x), (args, kwargs)
            )
            leaves = _pytree.tree_leaves((args, kwargs))
            if not any(isinstance(x, traced) for x in leaves) or all(
                isinstance(x, traced) for x in leaves if torch.is_tensor(x)
            ):
                return args, kwargs
            written = _pytree.tree_leaves(kwargs.get("out"))
            written += [args[0]] if args and writes(func) else []

            def exchanged(x: PyTree) -> PyTree:
                kept = isinstance(x, traced) or any(x is y for y in written)
                return x if kept else tensor.Tensor(self.array(x), self)

            return _pytree.tree_map_only(torch.Tensor, exchanged, (args, kwargs))

        def _met(self, constants: Sequence[torch.Tensor]) -> bool:
            """Whether one of them stands for something traced."""
            call = self.call
            return any(id(x) in call.parameters or _key(x) in call.written for x in constants)

        def _should_use_torchax_tensor(self, device: object) -> bool:
            return True

        def _meet(
            self,
            func: Callable[..., PyTree],
            types: object,
            args: tuple[object, ...],
            kwargs: dict[str, object],
        ) -> PyTree:
            """Run an operation of traced tensors and constants.

            The memory of constants that it writes into is traced from then on.
            """
            targets = [x for x in _targets(func, args, kwargs) if not isinstance(x, traced)]
            written = {id(x): tensor.Tensor(self.array(x, weak=False), self) for x in targets}

            def exchanged(x: PyTree) -> PyTree:
                if not torch.is_tensor(x) or isinstance(x, traced):
                    return x
                return written[id(x)] if id(x) in written else tensor.Tensor(self.array(x), self)

            args, kwargs = _pytree.tree_map(exchanged, (args, kwargs))
            out = super().dispatch(func, types, args, kwargs)
            for x in targets:
                self._store(x, written[id(x)].jax())
            back = {id(written[id(x)]): x for x in targets}
            return _pytree.tree_map(lambda x: back.get(id(x), x), out)

        def _store(self, x: torch.Tensor, value: jax.Array) -> None:
            whole = _whole(x)
            flat = self.array(whole, weak=False)
            places = _places(x)
            flat = flat.at[jnp.asarray(places.reshape(-1).numpy())].set(
                value.astype(flat.dtype).reshape(-1)
            )
            self.call.written[_key(x)] = (whole, flat)

        def _save(
            self, func: Callable[..., PyTree], args: tuple[object, ...], kwargs: dict[str, object]
        ) -> None:
            """Keep what a constant of the module held before the module changes it."""
            for x in _targets(func, args, kwargs):
                if _key(x) not in self.call.saved:
                    whole = _whole(x)
                    self.call.saved[_key(x)] = (whole, whole.clone())

        def array(self, x: torch.Tensor, *, weak: bool = True) -> jax.Array:
            """The array of a constant.

            torch lets numbers of no axis take the dtype of what they meet, as JAX does those that
            are weak.
            """
            known = self.call.parameters.get(id(x))
            if known is not None:
                found: jax.Array = known.jax()
                return found
            key = _key(x)
            if key in self.call.written:
                whole, flat = self.call.written[key]
                if whole.dtype != x.dtype:
                    raise tensor.OperatorNotFound("a view of another dtype has no lowering")
                return flat[jnp.asarray(_places(x).numpy())]
            if id(x) in self.call.arrays and key not in self.call.saved:
                return self.call.arrays[id(x)]
            if x.is_sparse:
                x = x.to_dense()
            if x.ndim == 0 and not x.is_complex():
                return jnp.asarray(x.item()) if weak else jnp.asarray(x.item(), _jax_dtype(x.dtype))
            with torch._C.DisableTorchFunction():  # what is looked at here is no step of the module
                return copied(x.resolve_conj().resolve_neg(), "a tensor that the module makes")

        def t2j_iso(self, torchtensors: PyTree) -> PyTree:
            """As torchax's, of constants too."""
            return _pytree.tree_map_only(
                torch.Tensor,
                lambda x: x.jax() if isinstance(x, traced) else self.array(x),
                torchtensors,
            )

        def view(self, x: PyTree) -> PyTree:
            """A traced tensor of a JAX array; other things are left as they are."""
            return tensor.Tensor(x, self) if isinstance(x, jax.Array) else x

        def unview(self, x: PyTree) -> PyTree:
            """The array of a tensor; other things are left as they are."""
            return self.t2j_iso(x) if torch.is_tensor(x) else x

        def _made_of(
            self,
            func: Callable[..., PyTree],
            data: PyTree,
            dtype: DTypeLike | None = None,
            **_: object,
        ) -> torch.Tensor:
            """`torch.tensor`, which detaches, and `torch.as_tensor` of traced tensors."""

            def stacked(node: PyTree) -> torch.Tensor:
                if isinstance(node, (list, tuple)):
                    return torch.stack([stacked(item) for item in node])
                return node if torch.is_tensor(node) else torch.tensor(node)

            with self._dispatch_mode:
                out = stacked(data)
                out = out if dtype is None else out.to(dtype)
                return out if func is torch.as_tensor and torch.is_tensor(data) else out.detach()

        def _to_copy(
            self, the_tensor: torch.Tensor, new_dtype: torch.dtype | None, new_device: object
        ) -> torch.Tensor:
            """Another dtype; traced tensors have no other device to go to."""
            if isinstance(the_tensor, view.View):
                the_tensor = the_tensor.torch()
            if not isinstance(the_tensor, tensor.Tensor):
                the_tensor = tensor.Tensor(self.array(the_tensor), self)
            if new_dtype is None or new_dtype == the_tensor.dtype:
                return the_tensor
            return the_tensor.apply_jax(jnp.astype, _jax_dtype(new_dtype))

        def guarded(self, outputs: PyTree) -> PyTree:
            """The outputs, NaN where the values that steps were chosen by are not those taken."""
            same = [
                jnp.all(x.jax() == self.array(value, weak=False))
                for x, value in self.call.following.looked_at
            ]
            if not same:
                return outputs

            def one(leaf: PyTree) -> PyTree:
                floating = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
                return jnp.where(jnp.stack(same).all(), leaf, jnp.nan) if floating else leaf

            return jax.tree.map(one, outputs)

        def restore(self) -> None:
            """End a call: give constants back what they held, and forget what was traced."""
            for whole, before in self.call.saved.values():
                whole.copy_(before)
            self.call.parameters, self.call.arrays = {}, {}
            self.call.written, self.call.saved = {}, {}
            self.call.following = Following(Steps({}))

    env = Environment()
    for kind in traced:
        _mend(kind, env)
    return env


def _mend(kind: Any, env: Any) -> None:
    """What traced tensors do otherwise than torch's.

    torchax's `x.type_as(y)` changes x itself, `x.data` carries gradients, and so does `detach` of
    a view. Within a `torch.autograd.Function` all do, since its forward is differentiated.
    """

    def detach(self: torch.Tensor) -> torch.Tensor:
        return self if env.call.within_function else env.view(jax.lax.stop_gradient(self.jax()))

    # Through the modes, which know the values that a batch has.
    kind.tolist = lambda self: torch.Tensor.tolist(self)
    kind.numpy = lambda self: torch.Tensor.numpy(self)
    kind.detach = detach
    kind.type_as = lambda self, other: self.to(other.dtype)
    kind.data = property(detach, torchax().tensor.Tensor.data.fset)


def _jax_dtype(dtype: torch.dtype) -> DTypeLike:
    found = torchax().ops.mappings.t2j_dtype(dtype)
    return found if wide() else jax.dtypes.canonicalize_dtype(found)


def _key(x: torch.Tensor) -> int:
    """Of the memory that a constant sees."""
    return int(x.untyped_storage()._cdata)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """All of the memory that a constant sees, flat."""
    x = x.detach()
    count = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((count,), (1,), 0)


def _places(x: torch.Tensor) -> torch.Tensor:
    """Where a constant's elements stand in its memory."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return torch.arange(count).as_strided(x.shape, x.stride(), x.storage_offset())


def _targets(
    func: Callable[..., PyTree], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[torch.Tensor, ...]:
    """The tensors that an operation of aten writes into."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [x for x in _pytree.tree_leaves(given) if torch.is_tensor(x)]
    return tuple(found)


def _is_cast(func: Callable[..., PyTree]) -> bool:
    aten = torch.ops.aten
    return func in (
        torch.Tensor.to,
        aten.lift_fresh.default,
        aten._to_copy,
        aten._to_copy.default,
    )


def _stays(func: Callable[..., PyTree]) -> bool:
    """Whether a function of constants is torch's to run, though their memory may be traced.

    One that is no operation of aten is taken apart into such, and one that returns a part of its
    argument's memory computes nothing.
    """
    schema = getattr(func, "_schema", None)
    return schema is None or (
        not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)
    )
