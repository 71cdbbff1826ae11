"""Matrices `Σ_i x_i x_iᵀ` on the outputs of a model, with a vector for each sample."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from curvax.filters import leaf_names
from curvax.typing import Batch, DTypeLike, PyTree


def by_sample(leaf: Array, samples: int) -> Array:
    """`(N, 1, ...)` from `(N, ...)`, and a copy for each sample of a scalar."""
    return leaf[:, None] if leaf.ndim else jnp.broadcast_to(leaf, (samples,))


def wide(leaf: Array) -> DTypeLike:
    """The dtype that sums over numbers of an array are in."""
    return jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32


def outer_products(gradients: PyTree, weight: Array, u: PyTree) -> PyTree:
    """`(1/W) Σ_i s_i <s_i, u>`."""
    leaves, treedef = jax.tree.flatten(u)
    rows = [g.astype(wide(g)).reshape(g.shape[0], -1) for g in jax.tree.leaves(gradients)]
    along = jnp.zeros(rows[0].shape[:1], weight.dtype)
    for g, leaf in zip(rows, leaves, strict=True):
        tangents = by_sample(leaf.astype(g.dtype), g.shape[0]).reshape(g.shape)
        # Not a sum of products, for which see `losses.objects`.
        along += jnp.einsum("ij,ij->i", g, tangents, precision="highest").astype(along.dtype)
    along /= weight
    products = []
    for g, leaf in zip(rows, leaves, strict=True):
        product = g * along.astype(g.dtype)[:, None]
        product = product.reshape(leaf.shape) if leaf.ndim else jnp.sum(product)
        products.append(product.astype(leaf.dtype))
    return jax.tree.unflatten(treedef, products)


def root(product: Callable[[PyTree], PyTree], like: PyTree) -> PyTree:
    """The x of a matrix `x xᵀ` that is known by its products with vectors like `like`."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), len(leaves))
    start = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    # The first product is along x. Scaled, since x to the fourth power may underflow.
    along = [
        a.astype(wide(a)) for a in jax.tree.leaves(product(jax.tree.unflatten(treedef, start)))
    ]
    # What is not finite stays so: the products show it.
    largest = jnp.stack([jnp.max(jnp.abs(a), initial=0) for a in along]).max()
    along = [a / jnp.where(largest == 0, 1, largest) for a in along]
    given = [a.astype(leaf.dtype) for a, leaf in zip(along, leaves, strict=True)]
    again = [
        b.astype(wide(b)) for b in jax.tree.leaves(product(jax.tree.unflatten(treedef, given)))
    ]
    square = sum(jnp.sum(a * b) for a, b in zip(along, again, strict=True))
    scaled = [b / jnp.sqrt(jnp.where(square == 0, 1, square)) for b in again]
    narrow = [x.astype(leaf.dtype) for x, leaf in zip(scaled, leaves, strict=True)]
    return jax.tree.unflatten(treedef, narrow)


def count_samples(outputs: PyTree, batch: Batch) -> int:
    """The length of the leading axis of all arrays but scalars.

    Raises:
        ValueError: not the same in all.
    """
    count, first = None, ""
    for what, tree in (("batch", batch), ("outputs", outputs)):
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            if not leaf.ndim:
                continue
            place = f"leaf {name!r} of {what}" if name else what
            if count is None:
                count, first = leaf.shape[0], place
            if leaf.shape[0] != count:
                raise ValueError(
                    f"{place} must have the samples on its leading axis, {count} as {first} has, "
                    f"for the gradients of single samples: got shape {leaf.shape}. Do not flatten "
                    "the outputs, close over what is shared, or take a loss with fisher_product"
                )
    if count is None or not any(leaf.ndim for leaf in jax.tree.leaves(outputs)):
        shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
        raise ValueError(f"outputs must have an axis of samples, got arrays of shapes {shapes}")
    return int(count)
