"""Checks of the arguments, and choice of the implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Float64

from curvax.checks import check_choice, check_count, check_number
from curvax.ops.block_ortho import ffi, reference
from curvax.ops.block_ortho.arguments import Arguments
from curvax.ops.dtypes import check_storage, compute_dtype
from curvax.ops.implementation import resolve
from curvax.ops.manual_axes import sharded_axes
from curvax.ops.shards import whole

__all__ = ["MAX_BLOCK", "orthonormalize_block", "padded_length", "rotate_basis"]

MAX_BLOCK = 32
# The width of a transaction with a GPU's memory, a multiple of what its loads and copies align to.
_ROW_BYTES = 128
_REORTHOGONALIZE = ("full", "lazy")


def padded_length(n: int, dtype: DTypeLike) -> int:
    """Columns of a basis whose rows all begin at a multiple of 128 bytes.

    Kernels of a GPU read rows that begin at a multiple of 16 bytes four to eight times as wide as
    others: without padding, only those with a length like 50304, and not 50257.

    Args:
        n: length of a vector.
        dtype: of the basis, one of those of `orthonormalize_block`.

    Returns:
        The least multiple of 128 bytes that holds `n` elements, in elements.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is below 1, or `dtype` is not that of a basis.
    """
    n = check_count("n", n, 1)
    check_storage("dtype", dtype)
    per_line = _ROW_BYTES // jnp.dtype(dtype).itemsize
    return -(-n // per_line) * per_line


def orthonormalize_block(
    basis: Float[ArrayLike, "rows columns"],
    block: Float[ArrayLike, "b n"],
    used: ArrayLike,
    seed: ArrayLike,
    *,
    scale: float = 1.0,
    reorthogonalize: str = "full",
    impl: str = "auto",
) -> tuple[
    Float[Array, "rows columns"],
    Float64[Array, "rows b"],
    Float64[Array, "b b"],
    Float64[Array, 4],
]:
    """Orthonormalises a block against a basis and itself, into the basis' next rows.

    With ``Q`` the first ``used`` rows (orthonormal) and ``W`` the block, both as rows,
    ``W = C^T Q + S^T Q_new``, where ``Q_new`` is written to rows ``[used, used + b)``. Block
    classical Gram-Schmidt with Pythagorean inner products (BCGS-PIP+, arXiv 2405.01298), in as many
    passes as the measured loss of orthogonality asks for. A direction that is only rounding noise
    of its column (dependent on the others, or zero) is replaced by a random one, and its row of
    ``S`` is zero. All tests are relative: scaling ``W`` scales ``C`` and ``S`` alone.

    Args:
        basis: shape ``(rows, columns)``; float32, float64, bfloat16 or float16, rows times
            ``scale``. Rows from ``used`` on are not used and may hold anything. Neither are columns
            from ``n`` on (see `padded_length`), which become zero in the new rows. Donate it: the
            kernel writes into it.
        block: shape ``(b, n)``, ``1 <= b <= 32``, ``1 <= n <= columns``; float64 for a float64
            basis, else float32. The kernel uses it as scratch: computed in the same ``jit`` it
            costs no memory, an argument of the ``jit`` is copied.
        used: int32 scalar; ``used + b <= min(rows, n)``.
        seed: an integer, or a uint32 array of shape ``(2,)``: of the random directions.
        scale: factor by which stored rows are larger than the vectors, for 16-bit storage; at most
            the largest number of the basis' dtype.
        reorthogonalize: ``"full"`` updates the block once more after the measurement that shows it
            to be orthonormal enough for that to be the last update; ``"lazy"`` only scales it, and
            the kernel reads the basis twice instead of three times, where the measured deviation is
            below 4 eps of the arithmetic, or below eps / 16 of 16-bit rows, whose rounding is then
            four times as large. New rows are orthogonal to 5e-7 instead of 1e-7 in float32, which a
            Krylov method does not notice. Random blocks and most steps of Lanczos gain; nearly
            dependent blocks are updated as by ``"full"``.
        impl: ``"auto"``, ``"ffi"`` (compiled kernel) or ``"reference"`` (plain JAX).

    Returns:
        ``(basis, coefficients, factor, info)``: the basis; ``C`` of shape ``(rows, b)``, zero from
        row ``used`` on; ``S`` of shape ``(b, b)``, upper triangular; and ``[passes, replaced
        directions, deviation from orthonormality measured before the last update, 0]``. The last
        three are float64 from the kernel, whether or not x64 is enabled: hand them to NumPy, or
        trace this under ``jax.enable_x64(True)``. The reference gives float32 if x64 is off. Where
        the input is not finite the new rows and the deviation are NaN.

    Raises:
        TypeError: `reorthogonalize` or `impl` is not a string, or `scale` not a number.
        ValueError: a shape, dtype or word is wrong, ``scale`` is beyond the range of a dtype,
            ``used`` is a known number and too large, or the arrays lie in shards, also under
            `shard_map`.
        RuntimeError: ``impl="ffi"`` without compiled kernels.
        ValueError or jax.errors.JaxRuntimeError: `used` out of range at run time (kernel of the CPU
            only; a CUDA device cannot raise, and leaves the basis as it is and all else NaN), or
            arrays that turn out to be sharded when a `jit` around this is compiled.
    """
    q, w = jnp.asarray(basis), jnp.asarray(block)
    _check_basis(q)
    compute = compute_dtype(q.dtype)
    if w.ndim != 2 or not 1 <= w.shape[1] <= q.shape[1] or not 1 <= w.shape[0] <= MAX_BLOCK:
        raise ValueError(
            f"block must have shape (b, n) with 1 <= b <= {MAX_BLOCK} and 1 <= n <= {q.shape[1]}, "
            f"the columns of the basis, got {w.shape}"
        )
    if w.dtype != compute:
        raise ValueError(f"block must have dtype {compute}, got {w.dtype}")
    scale = _scale(scale, q.dtype, compute)
    check_choice("reorthogonalize", reorthogonalize, _REORTHOGONALIZE)
    if axes := sharded_axes(q, w):
        raise ValueError(
            f"under shard_map, over the mesh axes {sorted(axes)}, orthonormalize_block would "
            "orthonormalise each shard by itself: call it outside, on whole vectors"
        )
    q, w = whole("basis", q), whole("block", w)
    most = min(q.shape[0], w.shape[1]) - w.shape[0]
    m = _count("used", used, most, "min(rows, n) - b")
    module = ffi if resolve(impl, "block_ortho") == "ffi" else reference
    lazy_below = _lazy_below(q.dtype) if reorthogonalize == "lazy" else 0.0
    return module.orthonormalize_block(Arguments(q, w, m, _seed(seed), scale, lazy_below))


def rotate_basis(
    basis: Float[ArrayLike, "rows columns"],
    rotation: ArrayLike,
    used: ArrayLike,
    kept: ArrayLike,
    *,
    impl: str = "auto",
) -> Float[Array, "rows columns"]:
    """Replaces the first rows of a basis by combinations of its used rows, in place.

    ``new[j] = sum_{i < used} rotation[i, j] * basis[i]`` for ``j < kept``; later rows are left as
    they are. Rows that are stored scaled stay so.

    Args:
        basis: shape ``(rows, columns)``; float32, float64, bfloat16 or float16. Padding is rotated
            like the rest. Donate it: the kernel needs no second basis.
        rotation: shape ``(rows, rows)``, float64: call this under ``jax.enable_x64(True)``, since
            float32 entries would leave a rotation orthogonal to 1e-7 only.
        used: int32 scalar, at most ``rows``.
        kept: int32 scalar, at most ``used``.
        impl: ``"auto"``, ``"ffi"`` (compiled kernel) or ``"reference"`` (plain JAX).

    Returns:
        The basis.

    Raises:
        ValueError: a shape or dtype is wrong, a known count is out of range, or the basis lies in
            shards.
        RuntimeError: ``impl="ffi"`` without compiled kernels.
        jax.errors.JaxRuntimeError: a count is out of range at run time (kernel of the CPU only; on
            a CUDA device, which cannot raise, every row becomes NaN), or the basis turns out to be
            sharded when a `jit` around this is compiled.
    """
    q = jnp.asarray(basis)
    _check_basis(q)
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError("rotation must be float64: call rotate_basis under jax.enable_x64(True)")
    r = jnp.asarray(rotation)
    rows = q.shape[0]
    if r.shape != (rows, rows) or r.dtype != jnp.float64:
        raise ValueError(
            f"rotation must have shape ({rows}, {rows}) and dtype float64, "
            f"got {r.shape} and {r.dtype}"
        )
    q = whole("basis", q)
    m = _count("used", used, rows, "rows")
    most = (int(used), "used") if isinstance(used, (int, np.integer)) else (rows, "rows")
    k = _count("kept", kept, *most)
    module = ffi if resolve(impl, "rotate_basis") == "ffi" else reference
    return module.rotate_basis(q, r, m, k)


def _lazy_below(storage: jnp.dtype) -> float:
    """The deviation from orthonormality that "lazy" leaves.

    A few times what an update leaves by rounding in the arithmetic; in 16 bits a quarter of the
    norm 0.2 eps of the error of a stored row. common/block_ortho_pass.h derives what it costs.
    """
    arithmetic, stored = (float(jnp.finfo(x).eps) for x in (compute_dtype(storage), storage))
    return max(4 * arithmetic, stored / 16)


def _scale(value: float, storage: jnp.dtype, compute: jnp.dtype) -> float:
    """`value`, by which numbers down to eps are multiplied and divided, and 1 to be stored."""
    scale, info = check_number("scale", value, positive=True), jnp.finfo(compute)
    widest = float(info.eps / info.tiny)
    low, high = 1 / widest, min(widest, float(jnp.finfo(storage).max))
    if not low <= scale <= high:
        raise ValueError(
            f"scale must be in [{low:.2g}, {high:.2g}] for a basis in {storage} and a block in "
            f"{compute}, got {scale:g}"
        )
    return scale


def _check_basis(basis: jax.Array) -> None:
    if basis.ndim != 2 or 0 in basis.shape:
        raise ValueError(
            f"basis must have shape (rows, columns), at least 1 each, got {basis.shape}"
        )
    check_storage("basis", basis.dtype)


def _count(name: str, value: ArrayLike, most: int, most_is: str) -> jax.Array:
    if isinstance(value, (int, np.integer)) and not 0 <= value <= most:
        raise ValueError(f"{name} must be in [0, {most_is} = {most}], got {value}")
    count = jnp.asarray(value)
    if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be an int32 scalar, got shape {count.shape} and dtype {count.dtype}"
        )
    return count.astype(jnp.int32)


def _seed(seed: ArrayLike) -> jax.Array:
    if isinstance(seed, (int, np.integer)):
        words = [int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF]
        return jnp.asarray(np.array(words, np.uint32))
    words_array = jnp.asarray(seed)
    if words_array.shape != (2,) or words_array.dtype != jnp.uint32:
        raise ValueError(
            f"seed must be an integer or a uint32 array of shape (2,), "
            f"got shape {words_array.shape} and dtype {words_array.dtype}"
        )
    return words_array
