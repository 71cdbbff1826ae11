"""The compiled device programs of the eigensolver, and the clock that times its parts."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from curvax.operators.base import Operator
from curvax.ops.block_ortho import orthonormalize_block, rotate_basis

# Columns per step of a float64 product of float32 rows: bounds the widened copy.
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


def run(clock: Clock, fun: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Call `fun`, compiled once per structure, shapes and dtypes of `args`.

    Compiled ahead of time, so that compilation is timed apart, and under JAX's 64-bit mode if it
    is on at the call.
    """
    leaves, treedef = jax.tree.flatten(args)
    avals = tuple((np.shape(leaf), leaf.dtype) for leaf in leaves)
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    key = (fun, treedef, avals, donate, x64)
    if key not in _cache:
        with clock.part("compile"):
            _cache[key] = jax.jit(fun, donate_argnums=donate).lower(*args).compile()
        while len(_cache) > _CACHED:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return _cache[key](*args)


def random_block(op: Operator, like: Array, seed: Array, draw: Array) -> Array:
    """A block of standard normal vectors, as many as `like` is long: the draw-th of the seed."""
    key = jax.random.fold_in(jax.random.key(seed), draw)
    return jax.random.normal(key, (like.shape[0], op.shape[0]), op.dtype)


def ritz_vectors(op: Operator, basis: Array, rows: Array) -> Any:
    """The given rows of the basis as vectors of the operator, in one program."""
    return op.unravel(basis[rows].astype(op.dtype))


def product(op: Operator, basis: Array, start: Array, like: Array) -> Array:
    """Multiply the rows `start : start + b` of the basis; `like` gives b by its length."""
    block = lax.dynamic_slice_in_dim(basis, start, like.shape[0])
    return op.product(block.astype(op.dtype))


def orthonormalize(basis: Array, block: Array, used: Array, seed: Array) -> Any:
    """Append a block to the donated basis. Traced with 64-bit mode on."""
    return orthonormalize_block(basis, block, used, seed)


def rotate(basis: Array, rotation: Array, used: Array, kept: Array) -> Array:
    """Replace the first rows of the donated basis by combinations of them."""
    return rotate_basis(basis, rotation, used, kept)


def residuals(basis: Array, products: Array, start: Array) -> tuple[Array, Array]:
    """Rayleigh quotients `λ` and residual norms `‖w − λ x‖/‖x‖` of rows, in float64.

    Args:
        basis: `(rows, n)`.
        products: `(b, n)`, the products `w` of the rows from `start`.
        start: scalar int32.

    Returns:
        Two arrays `(b,)`.
    """
    x = lax.dynamic_slice_in_dim(basis, start, products.shape[0]).astype(jnp.float64)
    w = products.astype(jnp.float64)
    squares = jnp.sum(x * x, axis=1)
    quotients = jnp.sum(x * w, axis=1) / squares
    difference = w - quotients[:, None] * x
    return quotients, jnp.sqrt(jnp.sum(difference * difference, axis=1) / squares)


def gram(basis: Array, like: Array) -> Array:
    """`X Xᵀ` in float64 of the first rows of the basis, as many as `like` is long."""
    rows, n = like.shape[0], basis.shape[1]
    whole = n // _CHUNK

    def piece(columns: Array) -> Array:
        wide = columns.astype(jnp.float64)
        return wide @ wide.T

    def add(i: Array, total: Array) -> Array:
        return total + piece(lax.dynamic_slice_in_dim(basis[:rows], i * _CHUNK, _CHUNK, axis=1))

    rest = piece(basis[:rows, whole * _CHUNK :])
    return lax.fori_loop(jnp.int32(0), jnp.int32(whole), add, rest) if whole else rest


def combine(basis: Array, weights: Array) -> Array:
    """`weights @ basis[:k]`, a block of combinations of the first k rows."""
    return jnp.matmul(weights, basis[: weights.shape[1]].astype(weights.dtype), precision="highest")


def multiply(op: Operator, block: Array) -> Array:
    """The products of a block of flat vectors."""
    return op.product(block)
