"""The compiled device programs of the eigensolver, and the clock that times its parts."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from curvax.krylov import storage
from curvax.operators.base import Operator
from curvax.ops.block_ortho import orthonormalize_block, rotate_basis

# Columns per step of whatever would need a widened copy of rows, or scratch as long as they are.
_CHUNK = 1 << 16


class Clock:
    """Wall seconds by part, without counting a nested part twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(
            ("compile", "products", "orthogonalization", "host", "verification"), 0.0
        )
        self._started = time.perf_counter()
        self._nested = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, less what nested parts charge."""
        outer, self._nested = self._nested, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] += spent - self._nested
            self._nested = outer + spent

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started


_cache: collections.OrderedDict[Any, Any] = collections.OrderedDict()
_CACHED = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function, compiled once per structure, shapes and dtypes of its arguments.

    Compiled ahead of time, so that compilation is timed apart and the memory can be read before
    a run.

    Attributes:
        fun: the function.
        donate: the arguments whose memory the results take over.
        wide: whether it is traced and run under JAX's 64-bit mode, whatever the user has set.
    """

    fun: Callable[..., Any]
    donate: tuple[int, ...] = ()
    wide: bool = False

    def __call__(self, clock: Clock, *args: Any) -> Any:
        """Run; the arrays of the donated arguments are gone after it."""
        with self._mode():
            return self._compiled(clock, args)(*args)

    def work_bytes(self, clock: Clock, *args: Any) -> int:
        """What a run allocates beside its arguments: scratch, and results not in donated memory.

        Args:
            clock: charged for the compilation, which a later run does not repeat.
            args: arrays, or `jax.ShapeDtypeStruct`s in their place.
        """
        with self._mode():
            memory = self._compiled(clock, args).memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(memory.temp_size_in_bytes + results)

    def _mode(self) -> contextlib.AbstractContextManager[None]:
        return jax.enable_x64(True) if self.wide else contextlib.nullcontext()

    def _compiled(self, clock: Clock, args: tuple[Any, ...]) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        avals = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        key = (self, treedef, avals, x64)
        if key not in _cache:
            with clock.part("compile"):
                lowered = jax.jit(self.fun, donate_argnums=self.donate).lower(*args)
                _cache[key] = lowered.compile()
            while len(_cache) > _CACHED:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]


def _program(**options: Any) -> Callable[[Callable[..., Any]], Program]:
    return lambda fun: Program(fun, **options)


@_program()
def random_block(op: Operator, like: Array, seed: Array, draw: Array) -> Array:
    """A block of standard normal vectors, as many as `like` is long: the draw-th of the seed."""
    key = jax.random.fold_in(jax.random.key(seed), draw)
    b, n = like.shape[0], op.shape[0]

    def fill(block: Array, first: Array, width: int) -> Array:
        piece = jax.random.normal(jax.random.fold_in(key, first), (b, width), op.dtype)
        return lax.dynamic_update_slice_in_dim(block, piece, first, axis=1)

    return _over_columns(fill, jnp.zeros((b, n), op.dtype), n)


@_program()
def load(basis: Array, start: Array, like: Array) -> Array:
    """The vectors that the rows from `start` stand for, as many as `like` is long."""
    return storage.rows(basis, start, like.shape[0])


@_program(donate=(1,))
def multiply(op: Operator, block: Array) -> Array:
    """The products of a donated block of flat vectors."""
    return op.product(block)


@_program(donate=(0, 1), wide=True)
def orthonormalize(basis: Array, block: Array, used: Array, seed: Array) -> Any:
    """Append a block to the basis, both donated.

    Returns:
        The basis; the vectors that its new rows stand for, which is what can be multiplied next
        (in the memory of the block, which is then the kernel's scratch: it would be copied if no
        result took its place); and the small results of `orthonormalize_block`.
    """
    scale = storage.scale(basis.dtype, basis.shape[1])
    basis, *small = orthonormalize_block(basis, block, used, seed, scale=scale)
    return basis, storage.rows(basis, used, block.shape[0]), *small


@_program(donate=(0,), wide=True)
def rotate(basis: Array, rotation: Array, used: Array, kept: Array) -> Array:
    """Replace the first rows of the donated basis by combinations of them."""
    return rotate_basis(basis, rotation, used, kept)


@_program(wide=True)
def residuals(basis: Array, products: Array, start: Array) -> tuple[Array, Array]:
    """Rayleigh quotients `λ` and residual norms `‖w − λ x‖/‖x‖` of rows, in float64.

    Args:
        basis: `(rows, n)`.
        products: `(b, n)`, the products `w` of the vectors that the rows from `start` stand for.
        start: scalar int32.

    Returns:
        Two arrays `(b,)`.
    """
    b, n = products.shape

    def columns(first: Array, width: int) -> tuple[Array, Array]:
        x = _piece(basis, start, b, first, width)
        w = lax.dynamic_slice_in_dim(products, first, width, axis=1)
        return x.astype(jnp.float64), w.astype(jnp.float64)

    def moments(total: Any, first: Array, width: int) -> Any:
        x, w = columns(first, width)
        return total[0] + jnp.sum(x * x, axis=1), total[1] + jnp.sum(x * w, axis=1)

    squares, inner = _over_columns(moments, (jnp.zeros(b), jnp.zeros(b)), n)
    quotients = inner / squares

    def rest(total: Array, first: Array, width: int) -> Array:
        x, w = columns(first, width)
        difference = w - quotients[:, None] * x
        return total + jnp.sum(difference * difference, axis=1)

    return quotients, jnp.sqrt(_over_columns(rest, jnp.zeros(b), n) / squares)


@_program(wide=True)
def gram(basis: Array, like: Array) -> Array:
    """`X Xᵀ` in float64 of the vectors that the first rows stand for, as many as `like` is long."""
    k, n = like.shape[0], basis.shape[1]

    def add(total: Array, first: Array, width: int) -> Array:
        x = _piece(basis, jnp.zeros_like(first), k, first, width).astype(jnp.float64)
        return total + x @ x.T

    return _over_columns(add, jnp.zeros((k, k)), n)


@_program()
def combine(basis: Array, weights: Array) -> Array:
    """`weights @ vectors`, of shape `(1, n)`; rows of weight zero may hold any finite numbers."""
    m, n = basis.shape

    def fill(out: Array, first: Array, width: int) -> Array:
        x = _piece(basis, jnp.zeros_like(first), m, first, width)
        piece = jnp.matmul(weights, x, precision="highest")
        return lax.dynamic_update_slice_in_dim(out, piece, first, axis=1)

    return _over_columns(fill, jnp.zeros((1, n), weights.dtype), n)


@_program(wide=True)
def squared_distance(a: Array, b: Array) -> Array:
    """`‖a − b‖²` in float64 of two arrays `(1, n)`."""

    def add(total: Array, first: Array, width: int) -> Array:
        pieces = (lax.dynamic_slice_in_dim(x, first, width, axis=1) for x in (a, b))
        wide = [piece.astype(jnp.float64) for piece in pieces]
        return total + jnp.sum((wide[0] - wide[1]) ** 2)

    return _over_columns(add, jnp.zeros(()), a.shape[1])


@_program()
def take(basis: Array, rows: Array) -> Array:
    """A copy of the given rows, as they are stored."""
    return basis[rows]


@_program()
def deliver(op: Operator, stored: Array) -> Any:
    """Stored rows as vectors of the operator."""
    return op.unravel(storage.vectors(stored, stored.shape[1]))


def _piece(basis: Array, start: Array, count: int, first: Array, width: int) -> Array:
    """Some columns of the vectors that the `count` rows from `start` stand for."""
    # XLA:CPU slices bfloat16 after widening it, and would hoist a wide copy of the whole basis out
    # of the loop over the columns.
    basis, first = lax.optimization_barrier((basis, first))
    piece = lax.dynamic_slice(basis, (start.astype(first.dtype), first), (count, width))
    return storage.vectors(piece, basis.shape[1])


def _over_columns(fun: Callable[[Any, Array, int], Any], carry: Any, n: int) -> Any:
    """Fold `fun(carry, first, width)` over chunks of the columns 0 to n."""
    whole, rest = divmod(n, _CHUNK)
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, c: fun(c, i * _CHUNK, _CHUNK), carry)
    return fun(carry, jnp.asarray(whole * _CHUNK), rest) if rest else carry
