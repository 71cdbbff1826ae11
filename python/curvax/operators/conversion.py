"""Operators that are not a derivative: a function, a dense array, a SciPy operator."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import Array
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvax.arrays import to_array
from curvax.checks import shown
from curvax.filters import difference
from curvax.operators.base import Blocks, Operator
from curvax.operators.checked_product import check_operator
from curvax.operators.closure import Closed, close
from curvax.operators.failures import is_runtime_error
from curvax.operators.foreign import adapter_of
from curvax.operators.model import Model
from curvax.operators.placement import check_not_typed_by_shards
from curvax.operators.space import VectorSpace, check_float_dtype
from curvax.operators.vectors import space_like
from curvax.options import takes_options
from curvax.typing import Batches, Block, DTypeLike, Params, PyTree, Vector


@runtime_checkable
class HasMatvec(Protocol):
    """A symmetric matrix that multiplies NumPy vectors, such as SciPy's `LinearOperator`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n, n)`."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """Real and floating."""
        ...

    def matvec(self, x: np.ndarray, /) -> np.ndarray:
        """The product with a vector `(n,)`."""
        ...


# What `eigsh` and its like take for A: see `as_operator`.
OperatorLike: TypeAlias = (
    Operator
    | Array
    | np.ndarray
    | list[list[float]]
    | scipy.sparse.sparray
    | scipy.sparse.spmatrix
    | HasMatvec
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FunctionOperator(Operator):
    """`from_matvec`: the arrays that the function closed over are data of the operator."""

    function: Closed
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""

        def one(flat: Array) -> Array:
            return self.space.ravel(self.function(self.space.unravel(flat)))

        return one(block[0])[None] if block.shape[0] == 1 else jax.vmap(one)(block)


@takes_options()
def from_matvec(matvec: Callable[[Vector], Vector], like: PyTree) -> FunctionOperator:
    """Wrap a symmetric matrix-vector product.

    Args:
        matvec: maps a vector to a vector of the same structure; linear, symmetric, traceable by
            JAX and usable under `vmap`. It is traced once, here.
        like: an operator, an example vector (an array or a pytree of arrays or
            `ShapeDtypeStruct`s), or an integer n for flat float32 vectors of length n.

    Returns:
        The operator; float64 if any leaf of `like` is, else float32.

    Raises:
        TypeError: `matvec` is not callable or not traceable; `like` has a leaf that is not real and
            floating.
        ValueError: `like` is empty, an integer below 1, of more than 2**48 numbers, or float64
            with JAX's 64-bit mode off, or `matvec` returns another structure or other shapes.
    """
    if not callable(matvec):
        raise TypeError(f"matvec must be callable, got {type(matvec).__name__}")
    space = space_like(like)
    example = jax.tree.unflatten(
        space.treedef, [jax.ShapeDtypeStruct(shape, space.dtype) for shape in space.shapes]
    )
    try:
        function = close(matvec, example)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            "matvec must be traceable by JAX: use jax.numpy in it, or, if it needs NumPy arrays, "
            "pass scipy.sparse.linalg.LinearOperator((n, n), matvec, dtype=np.float32) to eigsh"
        ) from error
    _check_result(jax.eval_shape(matvec, example), space)
    return FunctionOperator(function, space)


def _check_result(result: PyTree, space: VectorSpace) -> None:
    leaves, treedef = jax.tree.flatten(result)
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    if treedef != space.treedef or shapes != space.shapes:
        raise ValueError(
            "matvec must return the structure and shapes of its argument: expected "
            f"{difference(space.treedef, treedef)}; shapes {shown(space.shapes)}, got "
            f"{shown(shapes)}"
        )
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"matvec must return real floating values, got {leaf.dtype}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DenseOperator(Operator):
    """A dense symmetric array, times numbers: powers of two where it is very small or large.

    Its entries would else be read as zero below the smallest normal number.
    """

    matrix: Array
    factors: tuple[Array, ...]
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        products = jnp.matmul(block, self.matrix.T, precision="highest")
        for factor in self.factors:
            products = products * factor
        return products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IdentityOperator(Operator):
    """The identity."""

    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        return block

    @takes_options()
    def at(self, params: Params, *, batches: Batches = None) -> IdentityOperator:
        """The same: it has no parameters."""
        return self


@takes_options()
def identity(like: PyTree) -> IdentityOperator:
    """Make an identity, to damp an operator with: `A + damping * cx.identity(A)`.

    Args:
        like: an operator, an example vector (an array or a pytree of arrays or
            `ShapeDtypeStruct`s), or an integer n for flat float32 vectors of length n.

    Raises:
        TypeError: none of these, or a leaf that is not real and floating.
        ValueError: no element, an integer below 1, or float64 with JAX's 64-bit mode off.
    """
    return IdentityOperator(space_like(like))


class HostProducts:
    """The products of a matrix with NumPy vectors, and what the last of them raised.

    JAX turns what a callback raises into an error of its own, with a traceback for a message.
    """

    def __init__(self, matrix: HasMatvec | Callable[[Vector], Vector]) -> None:
        self.matrix = matrix
        self.error: Exception | None = None

    def __call__(self, block: Float[Array, "b n"]) -> Float[np.ndarray, "b n"]:
        """Multiply `(b, n)`, row by row."""
        rows = np.asarray(block)
        # SciPy's own matvec reshapes whatever it gets, and says no more than that it cannot.
        own = isinstance(self.matrix, LinearOperator)
        matvec = getattr(self.matrix, "_matvec" if own else "matvec")
        try:
            return np.stack([_checked_row(matvec(row), row) for row in rows])
        except Exception as error:
            self.error = error
            raise


def _checked_row(product: object, row: np.ndarray) -> np.ndarray:
    """What a `matvec` on NumPy vectors returned for a row, as one.

    Raises:
        TypeError: no array of real numbers.
        ValueError: of another shape.
    """
    n, wanted = len(row), f"A.matvec must return an array of {len(row)} real numbers"
    if isinstance(product, np.ma.MaskedArray):
        raise TypeError(f"{wanted}, got a masked array: fill it, array.filled(0)")
    try:
        array = np.asarray(product)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == np.bool_):
        hint = ": does it lack a return?" if product is None else ""
        raise TypeError(f"{wanted}, got {shown(product)}{hint}")
    if np.iscomplexobj(array):
        raise TypeError(
            f"{wanted}, got dtype {array.dtype}: if the imaginary part is rounding, return that "
            "array's .real"
        )
    if array.size != n or max(array.shape, default=1) != n:  # a column or a row is taken too
        raise ValueError(f"{wanted}, of shape ({n},), got shape {array.shape}")
    return array.reshape(n).astype(row.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HostOperator(Operator):
    """A matrix that multiplies NumPy vectors, such as SciPy's."""

    products: HostProducts = dataclasses.field(metadata={"static": True})
    space: VectorSpace = dataclasses.field(metadata={"static": True})

    def product(self, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """See `Operator.product`."""
        result = jax.ShapeDtypeStruct(block.shape, block.dtype)
        return jax.pure_callback(self.products, result, block, vmap_method="sequential")

    def matmat(self, block: Block) -> Block:
        """See `Operator.matmat`."""
        with original_errors(self):
            return jax.block_until_ready(super().matmat(block))

    def matvec(self, vector: Vector) -> Vector:
        """See `Operator.matvec`."""
        with original_errors(self):
            return jax.block_until_ready(super().matvec(vector))


@contextlib.contextmanager
def original_errors(op: Operator) -> Iterator[None]:
    """Raise what the products of a `HostOperator` raise, in place of JAX's account of it."""
    hosts = list(_host_products(op))
    for products in hosts:
        products.error = None
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raised = next((products.error for products in hosts if products.error is not None), None)
        if raised is None or not is_runtime_error(error):
            raise
        raise raised from None


def _host_products(part: object) -> Iterator[HostProducts]:
    """Those of an operator, and of those that it is made of."""
    if isinstance(part, HostOperator):
        yield part.products
    elif isinstance(part, tuple):
        for entry in part:
            yield from _host_products(entry)
    elif isinstance(part, Operator) and dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _host_products(getattr(part, field.name))


def as_operator(A: OperatorLike | Blocks) -> Operator:
    """An operator from whatever `eigsh` accepts.

    Args:
        A: an `Operator`, a dense square array, a SciPy sparse array, or anything with `shape`,
            `dtype` and `matvec` (or `matmat`) on NumPy vectors, such as SciPy's `LinearOperator`.

    Raises:
        TypeError: none of these, or not real and floating.
        ValueError: not square, empty, not symmetric (dense: measured), not finite, or float64
            with JAX's 64-bit mode off.
    """
    if isinstance(A, Operator):
        check_operator(A)
        check_not_typed_by_shards(A, "the operator's array")
        return A
    if isinstance(A, (np.ndarray, jax.Array, list)):
        return _from_dense(to_array(A, "A") if isinstance(A, list) else A)
    if scipy.sparse.issparse(A):
        A = aslinearoperator(A)
    if isinstance(A, Blocks):
        raise TypeError(
            "A must be one operator, got the blocks of one: call for each of them, as in "
            "{name: function(block) for name, block in A.items()}"
        )
    if isinstance(A, Model) or (adapter := adapter_of(A)) is not None:
        model = "" if isinstance(A, Model) else f" = {adapter}"
        raise TypeError(
            f"A must be an operator, got a {type(A).__name__}: make one of model{model} and "
            "batches first, as by curvax.hessian(model, batches)"
        )
    if not all(hasattr(A, name) for name in ("shape", "dtype", "matvec")):
        raise TypeError(
            "A must be a curvax operator, a square array, or have shape, dtype and matvec; got "
            f"{type(A).__name__}. A function becomes an operator by from_matvec(function, like)"
        )
    return _from_host(A)


def _check_square(shape: tuple[int, ...]) -> int:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"A must be square and not empty, got shape {tuple(shape)}")
    return int(shape[0])


def _from_dense(A: np.ndarray | Array) -> DenseOperator:
    n, dtype = _check_square(A.shape), check_float_dtype(A.dtype, "A")
    matrix = to_array(A, "A", dtype)
    host = np.asarray(A, np.float64)
    if not np.isfinite(host).all():
        raise ValueError("A must be finite, got an array with NaN or infinite entries")
    scale, difference = np.abs(host).max(), np.abs(host - host.T).max()
    if difference > 1e3 * np.finfo(dtype).eps * scale:
        raise ValueError(
            f"A must be symmetric: max |A - A.T| is {difference:.3g}, with max |A| {scale:.3g}; "
            "pass (A + A.T) / 2 if only its symmetric part is meant"
        )
    factors: tuple[Array, ...] = ()
    exponent = math.frexp(float(scale))[1]
    if abs(exponent) > -np.finfo(dtype).minexp // 4:
        matrix = jnp.asarray(np.ldexp(host, -exponent), dtype)
        # Two of them: one alone may be out of range.
        halves = exponent // 2, exponent - exponent // 2
        factors = tuple(jnp.asarray(2.0**half, dtype) for half in halves)
    return DenseOperator(matrix, factors, VectorSpace.of(jax.ShapeDtypeStruct((n,), dtype), dtype))


def _from_host(A: HasMatvec) -> HostOperator:
    n, dtype = _check_square(A.shape), check_float_dtype(A.dtype, "A")
    return HostOperator(HostProducts(A), VectorSpace.of(jax.ShapeDtypeStruct((n,), dtype), dtype))
