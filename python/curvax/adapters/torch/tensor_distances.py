"""Lowerings of norms and distances: torch's have derivatives 0 where they are 0."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import torch

from curvax.adapters.torch.tensor_registry import Register
from curvax.typing import DTypeLike


def register_distances(torchax: ModuleType, register: Register) -> None:
    """Give the lowerings.

    Args:
        torchax: the module.
        register: takes a lowering.
    """
    aten = torch.ops.aten

    def vector_norm(
        x: jax.Array,
        ord: float | str | None = 2,
        dim: int | Sequence[int] | None = None,
        keepdim: bool = False,
        *,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        x = x if dtype is None else x.astype(torchax.ops.mappings.t2j_dtype(dtype))
        axes = tuple(dim) if isinstance(dim, (list, tuple)) else dim
        return _norm(x, ord, axes if x.ndim and axes != () else None, keepdim)

    def cdist(a: jax.Array, b: jax.Array, p: float = 2.0, compute_mode: object = None) -> jax.Array:
        if p == 2 and (max(a.shape[-2], b.shape[-2]) > 25 or compute_mode == _MM):
            squares = (a * a).sum(-1)[..., None] + (b * b).sum(-1)[..., None, :]
            return root(jnp.maximum(squares - 2 * a @ jnp.swapaxes(b, -1, -2), 0), 2)
        return _norm(a[..., :, None, :] - b[..., None, :, :], p, -1)

    def pdist(x: jax.Array, p: float = 2.0) -> jax.Array:
        first, second = jnp.triu_indices(x.shape[0], k=1)
        return _norm(x[first] - x[second], p, -1)

    register(aten.linalg_vector_norm, vector_norm)
    for operation in (torch.cdist, aten.cdist, aten._cdist_forward):
        register(operation, cdist)
    register(aten._pdist_forward, pdist)
    register(aten.dist, lambda a, b, p=2: _norm(a - b, p, None))


_MM = "use_mm_for_euclid_dist"


def _norm(
    x: jax.Array, p: Any, axes: int | Sequence[int] | None, keepdims: bool = False
) -> jax.Array:
    size = absolute(x)
    if p == float("inf"):
        return size.max(axes, keepdims=keepdims)
    if p == float("-inf"):
        return size.min(axes, keepdims=keepdims)
    if p == 0:
        return (x != 0).sum(axes, keepdims=keepdims).astype(size.dtype)
    if p == 1:
        return size.sum(axes, keepdims=keepdims)
    # Of a square, in place of that of an absolute value, all derivatives exist at 0.
    powers = (x * x if not jnp.iscomplexobj(x) else size**2) if p == 2 else size**p
    return root(powers.sum(axes, keepdims=keepdims), p)


def absolute(x: jax.Array) -> jax.Array:
    """`abs` with derivative 0 at 0."""
    if jnp.iscomplexobj(x):
        return jnp.abs(x)
    return x * jax.lax.stop_gradient(jnp.sign(x))


def root(x: jax.Array, p: float) -> jax.Array:
    """`x ** (1 / p)` with derivatives 0 at 0."""
    positive = jnp.where(x > 0, x, 1)
    root = jnp.sqrt(positive) if p == 2 else positive ** (1 / p)
    return jnp.where(x > 0, root, 0)
