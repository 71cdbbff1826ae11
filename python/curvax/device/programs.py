"""Compiled device programs on blocks of vectors and a stored basis: what a solve runs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Float64, Integer, Shaped

from curvax.columns import matmul, over_columns, random_columns, row_sums
from curvax.device import storage
from curvax.device.storage import Length
from curvax.operators.base import Operator
from curvax.operators.checked_product import checked_product
from curvax.operators.closure import close
from curvax.operators.shards import sharded_arrays
from curvax.ops import assembly
from curvax.ops.block_ortho import orthonormalize_block, rotate_basis
from curvax.ops.inner_products import Rows, inner_products, residual_products
from curvax.ops.shards import whole
from curvax.program import Clock, host, program, users_mode
from curvax.typing import Block, DTypeLike, Float64Array, PyTree

# The most steps that one program does.
TOGETHER = 8

# Chunks of random columns that a CPU draws at once: one leaves threads without work.
_DRAWN_TOGETHER = 8

# The least part of a square that a difference of squares may leave: it costs ten of its 52 bits.
_LEAST_KEPT = 2.0**-10


def solve_clock() -> Clock:
    """A clock with the parts of a solve."""
    return Clock("products", "orthogonalization", "host", "verification")


@program()
def random_block(
    op: Operator, like: Shaped[Array, "b ..."], seed: Integer[Array, ""], draw: Integer[Array, ""]
) -> Float[Array, "b n"]:
    """A block of standard normal vectors, as many as `like` is long: the draw-th of the seed."""
    # The generator is named: the vectors are those of the seed whatever the default one is.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), draw)
    b, n = like.shape[0], op.shape[0]

    def normal(own: Array, width: int) -> Array:
        return jax.random.normal(own, (b, width), op.dtype)

    def fill(block: Array, first: Array, width: int) -> Array:
        piece = random_columns(normal, key, first, width)
        return lax.dynamic_update_slice_in_dim(block, piece, first, axis=1)

    chunks = max(1, _DRAWN_TOGETHER // b)
    return over_columns(fill, jnp.zeros((b, n), op.dtype), n, rows=b, chunks=chunks)


@program(lasting=True)
def zeros(rows: Length, columns: Length, like: Array) -> Shaped[Array, "rows columns"]:
    """Room for a basis, of the dtype of `like`."""
    return assembly.zeros((int(rows), int(columns)), like.dtype)


def empty_basis(clock: Clock, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """Zeros `(rows, columns)`, to be written to."""
    rows, columns = map(Length, shape)
    return zeros(clock, rows, columns, host(np.zeros(0, dtype)))


@program()
def load(
    basis: Float[Array, "rows columns"],
    start: Integer[Array, ""],
    like: Shaped[Array, "b ..."],
    n: Length | None = None,
) -> Float[Array, "b n"]:
    """The vectors that the rows from `start` stand for, as many as `like` is long."""
    return storage.rows(basis, start, like.shape[0], storage.length(basis, n))


@program(donate=(1,))
def multiply(op: Operator, block: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """The products of a donated block of flat vectors."""
    return checked_product(op, block)


def check_products(clock: Clock, op: Operator, block: Block) -> None:
    """Refuses an operator whose products come in shards, before the first of them.

    Args:
        clock: charged for the compilation of `multiply`, which is not done again.
        op: the operator.
        block: as for `multiply`, or a `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: they do, so that no basis could be kept of them.
    """
    sharding = multiply.result_shardings(clock, op, block)
    if not sharding.is_fully_replicated:
        found = sharded_arrays(op)
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise ValueError(
            "the products of the operator would come in shards, but a basis of them must lie "
            "whole on every device. In shards are "
            f"{', '.join(found[:4]) or 'none of its arrays, but what it computes'}{more}: "
            "replicate these, jax.device_put(x, NamedSharding(mesh, PartitionSpec())), or bring "
            "all arrays to one device, jax.device_put(x, jax.devices()[0]). Data sharded over its "
            "samples alone may stay so"
        )


def _check_whole(basis: Array, block: Array, *rest: object) -> None:
    """Refuses shards before compilation fails of them, with a text that is harder to read."""
    whole("the basis of the solve", basis)
    whole("a block of vectors", block)


@program(donate=(0, 1), wide=True, check=_check_whole)
def orthonormalize(
    basis: Array, block: Array, used: Array, seed: Array
) -> tuple[Array, Array, Array]:
    """Append a block to the basis, both donated.

    Returns:
        The basis; the vectors that its new rows stand for, which is what can be multiplied next
        (in the memory of the block, which is then the kernel's scratch: it would be copied if no
        result took its place); and `(1, ...)` numbers, for `unpack`.
    """
    return _append(basis, block, used, seed)


@program(donate=(1, 2), wide=True)
def steps(
    op: Operator, basis: Array, block: Array, first: Array, seed: Array, count: Array
) -> tuple[Array, Array, Array]:
    """As many times as `count` says, up to `TOGETHER`, `multiply` and `orthonormalize` in turn.

    One program in place of many is for products that are over before the host has begun the next.

    Args:
        op: the operator.
        basis: `(rows, columns)`, donated.
        block: `(b, n)`, donated: the vectors that the rows from `first` stand for.
        first: scalar int32.
        seed: `(2,)` uint32, of the first; the others follow.
        count: scalar int32.

    Returns:
        As `orthonormalize`, with one row of numbers for each time.
    """
    b = block.shape[0]
    with users_mode():
        product = close(checked_product, op, block)

    def step(i: Array, carry: PyTree) -> PyTree:
        basis, block, numbers = carry
        own = seed + jnp.stack([jnp.zeros_like(seed[0]), i.astype(seed.dtype)])
        used = first + (i + 1) * b
        basis, block, row = _append(basis, product(op, block), used, own)
        return basis, block, lax.dynamic_update_slice(numbers, row, (i, jnp.zeros_like(i)))

    numbers = jnp.zeros((TOGETHER, 4 + b * (b + basis.shape[0])))
    return lax.fori_loop(jnp.zeros_like(count), count, step, (basis, block, numbers))


def _append(basis: Array, block: Array, used: Array, seed: Array) -> tuple[Array, Array, Array]:
    b, n = block.shape
    scale = storage.scale(basis.dtype, n)
    # The residuals of a solve in 16 bits are those of rounded rows, far above what is left then. In
    # float32 they would show it: a tolerance of 1e-6 was missed, which three reads reach.
    how = "lazy" if basis.dtype.itemsize == 2 else "full"
    basis, coefficients, factor, info = orthonormalize_block(
        basis, block, used, seed, scale=scale, reorthogonalize=how
    )
    numbers = jnp.concatenate([info, factor.ravel(), coefficients.ravel()])
    return basis, storage.rows(basis, used, b, n), numbers[None]


def unpack(numbers: Float64Array, block: int) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Coefficients, factor and info of `orthonormalize_block`, from a row of numbers."""
    info, factor, coefficients = np.split(numbers, [4, 4 + block * block])
    return coefficients.reshape(-1, block), factor.reshape(block, block), info


@program(donate=(0,), wide=True)
def rotate(
    basis: Float[Array, "rows columns"],
    rotation: Float64[Array, "m p"],
    used: Integer[Array, ""],
    kept: Integer[Array, ""],
) -> Float[Array, "rows columns"]:
    """Replace the first rows of the donated basis by combinations of them."""
    return rotate_basis(basis, rotation, used, kept)


@program(wide=True)
def residuals(
    basis: Float[Array, "rows columns"],
    products: Float[Array, "b n"],
    start: Integer[Array, ""],
    following: Integer[Array, ""],
    thetas: Float64[Array, " b"],
    coupling: Float64[Array, "b b"],
) -> tuple[Float64[Array, " b"], Float64[Array, " b"], Float64[Array, " b"]]:
    """Of rows of the basis, in float64: what their products say, and what the recurrence did not.

    Args:
        basis: `(rows, columns)`.
        products: `(b, n)`, the products `w` of the vectors `x` that the rows from `start` are.
        start: scalar int32.
        following: scalar int32, the first row of the next block `q`, of b vectors.
        thetas: `(b,)` Ritz values.
        coupling: `(b, b)`, with which the recurrence predicts `w = θ x + qᵀ · coupling`.

    Returns:
        Three arrays `(b,)`: Rayleigh quotients λ, residual norms `‖w − λ x‖/‖x‖`, and the norms of
        `w − θ x − qᵀ · coupling`.
    """
    b, n = products.shape
    x = storage.stored(basis, start, b, n)

    def sweep(shifts: Array) -> Array:
        return residual_products(x, following, products, shifts, thetas, coupling).T

    squares, along, lengths, errors = sweep(thetas)
    # With r = w - θ x: λ = θ + xᵀr/xᵀx and ‖w - λ x‖² = ‖r‖² - (xᵀr)²/xᵀx. The difference has lost
    # digits where θ is far from λ for such a residual: then it is measured itself.
    quotients = thetas + along / squares
    norms = lengths - along * (along / squares)
    kept = jnp.all(norms >= lengths * _LEAST_KEPT)
    norms = lax.cond(kept, lambda: norms, lambda: sweep(quotients)[2])
    return quotients, jnp.sqrt(norms / squares), jnp.sqrt(errors)


@program(wide=True)
def gram(
    basis: Float[Array, "rows columns"], like: Shaped[Array, "k ..."], n: Length | None = None
) -> Float64[Array, "k k"]:
    """`X Xᵀ` in float64 of the vectors that the first rows stand for, as many as `like` is long."""
    length = storage.length(basis, n)
    return inner_products(storage.stored(basis, jnp.int32(0), like.shape[0], length), None, length)


@program(lasting=True)
def combine(
    basis: Float[Array, "m columns"], weights: Float[Array, "b m"], n: Length | None = None
) -> Float[Array, "b n"]:
    """`weights @ vectors`, `(b, n)`; rows of weight zero may hold any finite numbers."""
    m, length = basis.shape[0], storage.length(basis, n)

    def fill(out: Array, first: Array, width: int) -> Array:
        # XLA:CPU slices bfloat16 after widening it, and would hoist a wide copy of the whole basis
        # out of the loop over the columns.
        stored, first = lax.optimization_barrier((basis, first))
        x = lax.dynamic_slice_in_dim(stored, first, width, axis=1)
        piece = matmul(weights, storage.vectors(lax.optimization_barrier(x), length))
        return lax.dynamic_update_slice_in_dim(out, piece, first, axis=1)

    out = jnp.zeros((weights.shape[0], length), weights.dtype)
    return over_columns(fill, out, length, rows=m)


@program(wide=True)
def squared_distance(a: Float[Array, "b n"], b: Float[Array, "b n"]) -> Float64[Array, ""]:
    """`‖a − b‖²` in float64 of two arrays `(b, n)`."""
    ones, none = jnp.ones(len(a)), jnp.zeros((len(a), len(a)))
    rows = Rows.all_of(b)
    return row_sums(residual_products(rows, rows.start, a, ones, ones, none)[:, 2])


@program(lasting=True)
def take(
    basis: Float[Array, "rows columns"], rows: Integer[Array, " k"]
) -> Float[Array, "k columns"]:
    """A copy of the given rows, as they are stored, padding included."""
    return basis[rows]


@program(lasting=True)
def deliver(op: Operator, stored: Float[Array, "k columns"]) -> Block:
    """Stored rows as vectors of the operator."""
    n = op.shape[0]
    return op.unravel(storage.vectors(stored[:, :n], n))
