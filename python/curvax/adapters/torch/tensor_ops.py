"""Lowerings of torch's operations that torchax lacks or has wrong."""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.typing import ArrayLike

from curvax.adapters.torch.tensor_algebra import register_algebra
from curvax.adapters.torch.tensor_distances import register_distances
from curvax.adapters.torch.tensor_kinks import register_kinks
from curvax.adapters.torch.tensor_pools import register_pools
from curvax.adapters.torch.tensor_products import register_products
from curvax.adapters.torch.tensor_registry import Lowering, Register, register_in
from curvax.adapters.torch.tensor_resize import register_resize
from curvax.adapters.torch.tensor_views import register_views
from curvax.typing import DTypeLike


def register(torchax: ModuleType) -> None:
    """Mend torchax's lowerings, before an environment takes them over.

    Args:
        torchax: the module.
    """
    for name in ("jaten", "jc10d", "jtorch", "jtorchvision_nms"):  # or an environment does it later
        importlib.import_module(f"torchax.ops.{name}")
    take = register_in(torchax)
    register_views(torchax, take)
    register_pools(take)
    register_distances(torchax, take)
    register_kinks(torchax, take)
    register_algebra(take)
    register_resize(take)
    register_products(take)
    _register_reductions(torchax, take)
    _register_elementwise(torchax, take)
    _register_in_place(torchax, take)


def _dtype(torchax: ModuleType, dtype: torch.dtype | None) -> DTypeLike | None:
    return None if dtype is None else torchax.ops.mappings.t2j_dtype(dtype)


def _register_reductions(torchax: ModuleType, take: Register) -> None:
    aten = torch.ops.aten

    def reduced(function: Callable[..., jax.Array]) -> Lowering:
        def lowering(
            x: jax.Array,
            dim: int | Sequence[int] | None = None,
            keepdim: bool = False,
            *,
            dtype: DTypeLike | None = None,
        ) -> jax.Array:
            x = x if dtype is None else x.astype(_dtype(torchax, dtype))
            axes = None if dim is None or dim == [] or x.ndim == 0 else dim
            axes = tuple(axes) if isinstance(axes, (list, tuple)) else axes
            return function(x, axis=axes, keepdims=keepdim)

        return lowering

    take(aten.mean, reduced(jnp.mean))
    take(aten.sum, reduced(jnp.sum))

    def quantile(function: Callable[..., jax.Array]) -> Lowering:
        def lowering(
            x: jax.Array,
            q: jax.Array,
            dim: int | Sequence[int] | None = None,
            keepdim: bool = False,
            *,
            interpolation: str = "linear",
        ) -> jax.Array:
            q = jnp.asarray(q, x.dtype)
            return function(x, q, axis=dim, keepdims=keepdim, method=interpolation)

        return lowering

    for operation, function in (
        (torch.quantile, jnp.quantile),
        (torch.Tensor.quantile, jnp.quantile),
        (torch.nanquantile, jnp.nanquantile),
        (torch.Tensor.nanquantile, jnp.nanquantile),
    ):
        take(operation, quantile(function))

    def slice_scatter(
        x: jax.Array,
        source: jax.Array,
        dim: int = 0,
        start: int | None = None,
        end: int | None = None,
        step: int = 1,
    ) -> jax.Array:
        return x.at[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)].set(source)

    take(aten.slice_scatter, slice_scatter)

    def masked_select(x: jax.Array, mask: jax.Array) -> jax.Array:
        shape = jnp.broadcast_shapes(x.shape, mask.shape)
        chosen = np.broadcast_to(np.asarray(mask), shape)  # of a mask whose values are known
        return jnp.broadcast_to(x, shape)[chosen]

    take(aten.masked_select, masked_select)

    def take_along_dim(x: jax.Array, indices: jax.Array, dim: int | None = None) -> jax.Array:
        if dim is None:
            return x.reshape(-1)[indices.reshape(-1)]
        return jnp.take_along_axis(x, indices, axis=dim)

    take(torch.take_along_dim, take_along_dim)
    take(torch.Tensor.take_along_dim, take_along_dim)


_PRODUCTS = 64


def _register_elementwise(torchax: ModuleType, take: Register) -> None:
    aten, lowered = torch.ops.aten, torchax.ops.jaten

    def add(x: jax.Array, y: jax.Array, *, alpha: ArrayLike = 1) -> jax.Array:
        if _is_bool(x) and _is_bool(y):
            return jnp.logical_or(x, y)
        return lowered._aten_add(x, y, alpha=alpha)

    plain_power = lowered._aten_pow

    def power(x: jax.Array, y: jax.Array) -> jax.Array:
        # By products: torchax hands even x² to the power of floats, which costs twenty of them.
        whole = isinstance(y, (int, float)) and y == int(y) and abs(y) <= _PRODUCTS
        if whole and jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return jax.lax.integer_pow(x, int(y))
        return plain_power(x, y)

    take(aten.pow, power)
    take(aten.add, add)
    take(aten.detach, jax.lax.stop_gradient)
    take(aten.lgamma, lambda x: jax.scipy.special.gammaln(x))
    take(aten.digamma, lambda x: jax.scipy.special.digamma(x))
    take(aten.polygamma, lambda n, x: jax.lax.polygamma(jnp.full_like(x, n), x))
    take(aten.angle, jnp.angle)
    take(aten.ldexp, lambda x, y: x * jnp.exp2(jnp.asarray(y, x.dtype)))
    take(aten.complex, jax.lax.complex)
    take(aten.pad, torchax.ops.jtorch.pad)

    def refused(what: str) -> Lowering:
        def lowering(*_: object, **__: object) -> jax.Array:
            raise torchax.tensor.OperatorNotFound(f"{what} has no lowering")

        return lowering

    def embedding(
        weight: jax.Array,
        indices: jax.Array,
        padding_idx: int = -1,
        scale: bool = False,
        sparse: bool = False,
    ) -> jax.Array:
        if scale:  # its gradients are those of no function
            refused("Embedding(scale_grad_by_freq=True)")()
        return lowered._aten_embedding(weight, indices, padding_idx)

    take(aten.embedding, embedding)
    for bag in (aten._embedding_bag, aten._embedding_bag_forward_only):
        take(bag, _embedding_bag(refused("EmbeddingBag(scale_grad_by_freq=True)")))
    take(aten.embedding_renorm_, refused("Embedding(max_norm=...)"))

    def rrelu(
        x: jax.Array, noise: jax.Array, lower: float = 1 / 8, upper: float = 1 / 3, *_: object
    ) -> jax.Array:
        return jnp.where(x >= 0, x, x * ((lower + upper) / 2))

    take(aten.rrelu_with_noise, rrelu)


def _is_bool(x: jax.Array) -> bool:
    return isinstance(x, bool) or getattr(x, "dtype", None) == jnp.bool_


def _register_in_place(torchax: ModuleType, take: Register) -> None:
    """Every operation that writes into its first argument, by the one that does not.

    Of many torchax has none, and of `zero_` and `fill_` ones that do not write through views.
    """
    aten = torch.ops.aten
    in_place = torchax.ops.op_base.InplaceOp
    known = torchax.ops.ops_registry.all_aten_ops
    take(aten.zero, jnp.zeros_like)
    take(aten.fill, lambda x, value: jnp.full(x.shape, value, x.dtype))
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    for name in sorted(names):
        space, _, short = name.partition("::")
        if space != "aten" or not short.endswith("_") or short.startswith("_"):
            continue
        if name[:-1] not in names or short in ("copy_", "detach_", "resize_", "set_"):
            continue
        packet = getattr(aten, short)
        forms = [packet, *(getattr(packet, form) for form in packet.overloads())]
        if short not in ("zero_", "fill_") and any(form in known for form in forms):
            continue
        take(packet, in_place(getattr(aten, short[:-1])), view=True)
    for short in ("squeeze", "unsqueeze", "transpose", "t"):
        function = getattr(aten, short)
        take(getattr(aten, f"{short}_"), in_place(function, replace=True), view=True)
    for short, function in (
        ("__iand__", aten.bitwise_and),
        ("__ior__", aten.bitwise_or),
        ("__ixor__", aten.bitwise_xor),
    ):
        take(getattr(aten, short), in_place(function), view=True)

    def copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _write(x, jnp.broadcast_to(x._env.t2j_iso(source), x.jax().shape))
        return x

    take(aten.copy_, copy, view=True)


def _write(x: torch.Tensor, value: jax.Array) -> None:
    """Into a traced tensor."""
    value = value.astype(x.jax().dtype)
    if hasattr(x, "parent"):
        x.update(value)
    else:
        x._elem = value


def _embedding_bag(refuse: Callable[[], object]) -> Lowering:
    def lowering(
        weight: jax.Array,
        indices: jax.Array,
        offsets: jax.Array,
        scale: bool = False,
        mode: int = 0,
        sparse: bool = False,
        weights: jax.Array | None = None,
        include_last: bool = False,
        padding_idx: int = -1,
    ) -> tuple[jax.Array, ...]:
        if scale:
            refuse()
        starts = offsets[:-1] if include_last else offsets
        bags = starts.shape[0]
        bag = jnp.searchsorted(starts, jnp.arange(indices.shape[0]), side="right") - 1
        counted = indices != padding_idx
        counts = jnp.zeros(bags, jnp.int64).at[bag].add(counted)
        rows = weight[indices]
        if mode == 2:
            rows = jnp.where(counted[:, None], rows, -jnp.inf)
            largest = jax.ops.segment_max(rows, bag, bags)
            out = jnp.where(counts[:, None] > 0, largest, 0)
        else:
            factor = counted if weights is None else counted * weights
            out = jax.ops.segment_sum(rows * factor[:, None], bag, bags)
            out = out / jnp.maximum(counts, 1)[:, None] if mode == 1 else out
        return out, bag, counts, jnp.zeros((0,), jnp.int64)

    return lowering
