"""The space that an operator acts on, and what may be an array of numbers in it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from curvax.arrays import to_array
from curvax.filters import difference, leaf_names
from curvax.operators.placement import check_not_typed_by_shards
from curvax.typing import DTypeLike, PyTree, PyTreeDef, Vector

# XLA counts the bytes of an array in 64 bits, and ends the process where they overflow: this leaves
# room for thousands of rows in float64.
MOST = 2**48


@dataclasses.dataclass(frozen=True)
class VectorSpace:
    """Pytrees of one structure, seen as flat vectors in the order of `ravel_pytree`.

    Attributes:
        treedef: the structure.
        shapes: the shape of each leaf.
        names: the name of each leaf, for messages.
        dtype: float32 or float64, of every leaf.
    """

    treedef: PyTreeDef
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        if self.n > MOST:
            raise ValueError(f"a vector may have at most {MOST} numbers, got n = {self.n}")

    @classmethod
    def of(cls, tree: PyTree, dtype: DTypeLike) -> "VectorSpace":
        """The space of the vectors that look like `tree`, a pytree of things with a shape."""
        leaves, treedef = jax.tree.flatten(tree)
        shapes = tuple(tuple(np.shape(leaf)) for leaf in leaves)
        return cls(treedef, shapes, tuple(leaf_names(tree)), np.dtype(dtype))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements per leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def n(self) -> int:
        """The dimension."""
        return sum(self.sizes)

    def is_block(self, tree: PyTree) -> bool:
        """Whether `tree` is a block of vectors: its first leaf has an axis more than here."""
        leaves = jax.tree.leaves(tree)
        return bool(leaves) and np.ndim(leaves[0]) == len(self.shapes[0]) + 1

    def ravel(
        self, tree: PyTree, batch_axes: int = 0, what: str = "vector"
    ) -> Float[Array, "*b n"]:
        """Flatten: leaves of shape `batch + leaf` become one array `batch + (n,)`.

        Args:
            tree: the vector, or vectors.
            batch_axes: the number of axes of `batch`.
            what: the name of `tree` in messages.

        Raises:
            TypeError: a leaf is complex, or no array of numbers, or has a mask.
            ValueError: another structure, a leaf of another shape, or numbers beyond the range.
        """
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            raise ValueError(f"{what} must have the structure {difference(self.treedef, treedef)}")
        batch = np.shape(leaves[0])[:batch_axes]
        flat = []
        for leaf, shape, name in zip(leaves, self.shapes, self.names, strict=True):
            place = f"leaf {name!r} of {what}" if name else what
            check_not_typed_by_shards(leaf, place)
            if np.shape(leaf) != (*batch, *shape):
                raise ValueError(
                    f"{place} must have shape {(*batch, *shape)}, got {np.shape(leaf)}"
                )
            flat.append(to_array(leaf, place, self.dtype).reshape(*batch, math.prod(shape)))
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)

    def unravel(self, flat: Float[Array, "*b n"]) -> Vector:
        """The inverse: `batch + (n,)` becomes leaves of shape `batch + leaf`."""
        batch = flat.shape[:-1]
        borders = np.cumsum(self.sizes)[:-1]
        pieces = jnp.split(flat, borders, axis=-1)
        leaves = [p.reshape(*batch, *s) for p, s in zip(pieces, self.shapes, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)


def is_array(value: object) -> bool:
    """Whether `value` is an array, of numbers or bools, that JAX can compute with."""
    if isinstance(value, (np.ndarray, np.generic)):
        return bool(jnp.issubdtype(value.dtype, np.number)) or value.dtype == np.bool_
    return isinstance(value, jax.Array) or hasattr(value, "__jax_array__")


def check_float_dtype(dtype: DTypeLike, what: str) -> np.dtype:
    """The dtype of an operator on things of `dtype`: float32, or float64 where they are.

    Raises:
        TypeError: neither real nor floating.
        ValueError: float64 while JAX's 64-bit mode is off.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be of a real floating dtype, got {np.dtype(dtype).name}")
    if np.dtype(dtype) != np.float64:
        return np.dtype(np.float32)
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError(
            f"{what} is float64, but JAX's 64-bit mode is off: call "
            "jax.config.update('jax_enable_x64', True) first, or cast to float32"
        )
    return np.dtype(np.float64)
