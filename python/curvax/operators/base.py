"""What every operator is: a symmetric matrix that can be multiplied, and the space it acts on."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.sparse.linalg import LinearOperator

from curvax.arrays import to_array
from curvax.filters import Filter, difference, leaf_names
from curvax.operators.placement import check_not_typed_by_shards
from curvax.program import jit, untracked_settings

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

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        if self.n > MOST:
            raise ValueError(f"a vector may have at most {MOST} numbers, got n = {self.n}")

    @classmethod
    def of(cls, tree: Any, dtype: Any) -> "VectorSpace":
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

    def is_block(self, tree: Any) -> bool:
        """Whether `tree` is a block of vectors: its first leaf has an axis more than here."""
        leaves = jax.tree.leaves(tree)
        return bool(leaves) and np.ndim(leaves[0]) == len(self.shapes[0]) + 1

    def ravel(self, tree: Any, batch_axes: int = 0, what: str = "vector") -> Array:
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

    def unravel(self, flat: Array) -> Any:
        """The inverse: `batch + (n,)` becomes leaves of shape `batch + leaf`."""
        batch = flat.shape[:-1]
        borders = np.cumsum(self.sizes)[:-1]
        pieces = jnp.split(flat, borders, axis=-1)
        leaves = [p.reshape(*batch, *s) for p, s in zip(pieces, self.shapes, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)


class Operator(abc.ABC):
    """A symmetric n×n matrix given by its products.

    Vectors have the structure of `params` (of `like`, for `from_matvec`); blocks of vectors have
    one more, leading, axis. `op @ v` takes either. Every operator is a pytree, so that it can be
    an argument of a jitted function: its parameters and data are then arguments too, not
    constants that are compiled in.
    """

    space: VectorSpace

    # NumPy's scalars leave `2 * op` to `__rmul__`.
    __array_ufunc__ = None

    @abc.abstractmethod
    def product(self, block: Array) -> Array:
        """Multiply flat vectors: `(b, n)` in, `(b, n)` out, of `dtype`. Pure and traceable."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`."""
        return (self.space.n, self.space.n)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        return self.space.dtype

    def __repr__(self) -> str:
        names, n = [name for name in self.space.names if name], self.shape[0]
        shown = ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
        leaves = f", leaves: {shown}" if names else ""
        return f"{type(self).__name__}(shape=({n}, {n}), dtype={self.dtype.name}{leaves})"

    def ravel(self, vector: Any) -> Array:
        """Flatten a vector, leaves `leaf`, to `(n,)`, or a block, leaves `(b, *leaf)`, to `(b, n)`.

        Raises:
            TypeError: a leaf is complex.
            ValueError: another structure, or a leaf of another shape.
        """
        return self.space.ravel(vector, batch_axes=int(self.space.is_block(vector)))

    def unravel(self, flat: Any) -> Any:
        """Turn `(n,)`, or `(b, n)`, back into a vector, or a block of b vectors.

        Raises:
            ValueError: another shape.
        """
        shape, n = np.shape(flat), self.shape[0]
        if len(shape) not in (1, 2) or shape[-1] != n:
            raise ValueError(f"flat must have shape ({n},) or (b, {n}), got {shape}")
        return self.space.unravel(jnp.asarray(flat))

    def at(self, params: Any, *, batches: Any = None) -> "Operator":
        """The same operator at other parameters, or on other batches; see `Curvature.at`.

        Sums, multiples, `congruence`, `project_off` and `restrict` of such operators go along.

        Raises:
            TypeError: the operator is not one of a loss.
        """
        raise TypeError(
            f"a {type(self).__name__} was not made of parameters and batches, and cannot be moved "
            "to others: make it anew"
        )

    def matvec(self, vector: Any) -> Any:
        """Multiply one vector; the result has its structure."""
        check_operator(self)
        return self.unravel(compiled_product(self, self.ravel(vector)[None])[0])

    def matmat(self, block: Any) -> Any:
        """Multiply a block of vectors, leaves `(b, *leaf)`; the result has its structure."""
        check_operator(self)
        return self.unravel(compiled_product(self, self.space.ravel(block, batch_axes=1)))

    def __matmul__(self, vector: Any) -> Any:
        """Multiply a vector or a block, told apart by the number of axes of the first leaf.

        Raises:
            TypeError: `vector` is an operator.
            ValueError: another structure, or leaves of other shapes.
        """
        if isinstance(vector, Operator):
            raise TypeError(
                "the product of two operators is not symmetric, and so none: multiply a vector by "
                "both, A @ (B @ v), or use A.congruence(d) for a diagonal matrix on both sides"
            )
        check_operator(self)
        return self.matmat(vector) if self.space.is_block(vector) else self.matvec(vector)

    def __add__(self, other: Any) -> "Operator":
        """`A + B`, on the same vectors.

        Raises:
            TypeError: a float32 and a float64 operator.
            ValueError: operators on different vectors.
        """
        return _algebra().add((self, other)) if isinstance(other, Operator) else NotImplemented

    def __radd__(self, other: Any) -> "Operator":
        """`0 + A`, with which Python's `sum` of operators begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Any) -> "Operator":
        """`A − B`; see `__add__`."""
        return self + (-other) if isinstance(other, Operator) else NotImplemented

    def __neg__(self) -> "Operator":
        """`−A`."""
        return -1.0 * self

    def __mul__(self, factor: Any) -> "Operator":
        """`c A`, with a real number c.

        Raises:
            TypeError: not a real number.
            ValueError: an array, or not finite.
        """
        return _algebra().scale(factor, self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Operator":
        """`A / c`, with a real number c other than zero."""
        return self * (1 / divisor)

    def congruence(self, diagonal: Any) -> "Operator":
        """`D A D` with a diagonal matrix D, as of a preconditioned Hessian `P^(-1/2) H P^(-1/2)`.

        Args:
            diagonal: the entries of D, a vector (of the structure of `params`, or flat `(n,)`).

        Raises:
            ValueError: another structure or shape, or not finite.
        """
        return _algebra().congruence(self, diagonal)

    def project_off(self, vectors: Any) -> "Operator":
        """`P A P`, with P the orthogonal projection off the span of `vectors`.

        Args:
            vectors: a vector, a block of vectors, either of them flat, or an `EigenResult`.

        Raises:
            ValueError: zero, not finite, linearly dependent, or as many as there are parameters.
        """
        return _algebra().project_off(self, vectors)

    def restrict(self, where: Filter) -> "Operator":
        """The diagonal block on the leaves that a filter selects; the others are None in vectors.

        A product costs one of the whole operator: where there is a choice, the argument `where` of
        `hessian` and its like is cheaper.

        Args:
            where: as for `hessian`.

        Raises:
            TypeError: `where` is neither callable nor a pytree of bools.
            ValueError: it selects nothing.
        """
        from curvax.operators.blocks import restrict

        return restrict(self, where)

    def blocks(self, by: Any, *, stacked: str | Sequence[str] = ()) -> Any:
        """Diagonal blocks, as of the layers of a network.

        The vectors of a block are dicts, keyed by the leaves' names without what all of them begin
        with; so blocks of equal layers share every compiled program. `eigsh`, `trace` and
        `diagonal` take all blocks at once.

        Args:
            by: which leaves make a block: the number of parts of the names that are to agree (2
                makes `blocks.0` of `blocks.0.attn.qkv`), a function from a leaf's name to that of
                its block or None, or a dict of block names and predicates such as
                `match_names(...)`.
            stacked: names of containers whose leaves hold all layers on their leading axis. Each
                layer is then a leaf of its own: `layers.attn.q` becomes `layers.0.attn.q`, ...

        Returns:
            A `Blocks`: a mapping of names to operators.

        Raises:
            TypeError: `by` is none of these, or returns neither a string nor None.
            ValueError: nothing is selected, `stacked` names no container, or a depth below 1.
        """
        from curvax.operators.blocks import blocks

        return blocks(self, by, stacked)

    def to_scipy(self) -> LinearOperator:
        """The same operator on flat NumPy vectors, for SciPy's solvers."""

        def matmat(columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            block = jnp.asarray(np.ascontiguousarray(columns.T), self.dtype)
            return np.asarray(compiled_product(self, block)).T

        def matvec(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return matmat(v.reshape(-1, 1))

        return LinearOperator(
            self.shape, matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=self.dtype
        )


def _algebra() -> Any:
    # Imported late: what it makes are operators.
    from curvax.operators import algebra

    return algebra


def compiled_product(op: Operator, block: Array) -> Array:
    """`op.product`, compiled; the operator's arrays are arguments."""
    products: Array = _compiled_product(untracked_settings(), op, block)
    return products


@functools.partial(jit, static=0)
def _compiled_product(settings: tuple[Any, ...], op: Operator, block: Array) -> Array:
    """`settings` are read where the product is traced."""
    return checked_product(op, block)


def checked_product(op: Operator, block: Array) -> Array:
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


def check_operator(op: Operator) -> None:
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


def is_array(value: Any) -> bool:
    """Whether `value` is an array, of numbers or bools, that JAX can compute with."""
    if isinstance(value, (np.ndarray, np.generic)):
        return bool(jnp.issubdtype(value.dtype, np.number)) or value.dtype == np.bool_
    return isinstance(value, jax.Array) or hasattr(value, "__jax_array__")


def check_float_dtype(dtype: Any, what: str) -> np.dtype[Any]:
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
