"""A product with an operator: checked, since an operator may be a user's own, and compiled."""

import functools
from collections.abc import Hashable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from curvax.operators.space import VectorSpace
from curvax.program import as_arguments, jit, untracked_settings


@runtime_checkable
class Matrix(Protocol):
    """What of an operator a product needs."""

    @property
    def space(self) -> VectorSpace:
        """Of the vectors."""

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64."""

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Multiply flat vectors `(b, n)`."""


def compiled_product(op: Matrix, flat: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """`op.product` of a block or of one vector, compiled; the operator's arrays are arguments."""
    products: Array = _compiled_product(untracked_settings(), *as_arguments((op, flat)))
    return products


@functools.partial(jit, static=0)
def _compiled_product(settings: Hashable, op: Matrix, flat: Array) -> Array:
    """`settings` are read where the product is traced."""
    return checked_product(op, flat) if flat.ndim > 1 else checked_product(op, flat[None])[0]


def checked_product(op: Matrix, block: Array) -> Array:
    """`op.product(block)`, which in an operator of one's own may be anything.

    Raises:
        TypeError: no array of the operator's dtype.
        ValueError: another shape than that of `block`.
    """
    products, name = op.product(block), type(op).__name__
    if not isinstance(products, Array) or products.dtype != op.dtype:
        got = getattr(products, "dtype", type(products).__name__)
        raise TypeError(f"{name}.product must return an array of {op.dtype}, got {got}")
    if products.shape != block.shape:
        raise ValueError(
            f"{name}.product must return the shape of its argument, (b, n) = {block.shape}, got "
            f"{products.shape}"
        )
    return products


def check_operator(op: Matrix) -> None:
    """Check what an operator of one's own must have, beside the method `product`.

    Raises:
        TypeError: it has no `space`, or is no pytree.
    """
    name = type(op).__name__
    if not isinstance(getattr(op, "space", None), VectorSpace):
        raise TypeError(
            f"{name}.space must be a VectorSpace, such as "
            "VectorSpace.of(params, jnp.float32), or the space of another operator"
        )
    if jax.tree_util.all_leaves([op]):
        raise TypeError(
            f"{name} must be a pytree, as JAX passes it to compiled functions: decorate it with "
            "@jax.tree_util.register_dataclass and @dataclasses.dataclass(frozen=True, eq=False)"
        )
