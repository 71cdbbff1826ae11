"""Lowerings of linear algebra that torchax has wrong, or that JAX cannot differentiate."""

import jax
import jax.numpy as jnp
import torch

from curvax.adapters.torch.tensor_registry import Lowering, Register
from curvax.typing import PyTree


def register_algebra(register: Register) -> None:
    """Give the lowerings.

    Args:
        register: takes a lowering.
    """
    aten = torch.ops.aten
    register(aten.linalg_householder_product, _householder_product)
    register(aten._linalg_slogdet, _slogdet)
    register(torch.slogdet, lambda a: torch.return_types.slogdet(tuple(jnp.linalg.slogdet(a))))
    register(torch.logdet, _logdet)
    register(torch.Tensor.logdet, _logdet)
    for operation in (torch.linalg.solve, torch.linalg.solve_ex, aten._linalg_solve_ex):
        register(operation, _solve(operation is torch.linalg.solve))


def _solve(alone: bool) -> Lowering:
    def lowering(
        a: jax.Array, b: jax.Array, *, left: bool = True, check_errors: bool = False
    ) -> PyTree:
        # As torch tells rows of vectors from matrices.
        vectors = b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])
        b = b[..., None] if vectors else b
        if left:
            x = jnp.linalg.solve(a, b)
        else:
            x = jnp.linalg.solve(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2))
            x = jnp.swapaxes(x, -1, -2)
        x = x[..., 0] if vectors else x
        return x if alone else (x, jnp.zeros(a.shape[:-2], jnp.int32))

    return lowering


def _slogdet(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    sign, value = jnp.linalg.slogdet(a)
    return sign, value, a, jnp.zeros(a.shape[:-1], jnp.int32)


def _logdet(a: jax.Array) -> jax.Array:
    sign, value = jnp.linalg.slogdet(a)
    return jnp.where(sign < 0, jnp.nan, value)


def _householder_product(a: jax.Array, tau: jax.Array) -> jax.Array:
    """The first columns of a product of reflections; JAX's own has no derivative."""
    rows, columns = a.shape[-2:]
    below = jnp.arange(rows)[:, None] > jnp.arange(columns)
    vectors = jnp.where(below, a, 0) + jnp.eye(rows, columns, dtype=a.dtype)
    start = jnp.broadcast_to(jnp.eye(rows, columns, dtype=a.dtype), a.shape)

    def reflect(
        product: jax.Array, vector_and_scale: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        vector, scale = vector_and_scale
        along = jnp.einsum("...i,...ij->...j", vector.conj(), product)
        return product - scale[..., None, None] * vector[..., None] * along[..., None, :], None

    count = tau.shape[-1]
    parts = (jnp.moveaxis(vectors, -1, 0)[:count], jnp.moveaxis(tau, -1, 0))
    return jax.lax.scan(reflect, start, parts, reverse=True)[0]
