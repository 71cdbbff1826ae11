"""What a solve will need: bytes, from the compiled programs that it runs, and products.

A solve allocates its large arrays in turns, so its peak is the largest phase and not the sum:

    multiply         basis + block + scratch of the product (the products take the block's memory)
    orthonormalise   basis + block + scratch, none where the kernel does it
    restart          basis + scratch, likewise
    hand over        basis + the k wanted rows as they are stored
    results          the k wanted rows as they are stored and as vectors: the basis is gone

beside small float64 matrices on the host, which count where the basis has thousands of rows, and
only where the host's memory is the basis' too.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from curvax.device import programs, storage
from curvax.krylov.certificates import SAMPLES
from curvax.krylov.sizes import block_penalty
from curvax.memory import on_device
from curvax.operators.base import Operator
from curvax.program import Clock

# Square float64 matrices alive on the host while one of them is decomposed: the projection, or the
# operator itself, its symmetric part, the eigenvectors before and after, and LAPACK's copy and
# scratch (`syevd` takes two).
_HOST_MATRICES = 7


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The memory of a solve, in bytes.

    Attributes:
        basis: the stored Krylov basis; 0 if the whole matrix is formed instead.
        product: a block of vectors and the scratch of its product.
        orthogonalization: a block and the scratch of its orthonormalisation, or of a restart.
        host: small float64 matrices in the memory of the host.
        results: the eigenvectors.
        linearization: residuals that the operator holds already: not part of the growth.
        peak: the growth: the largest sum of what is alive at the same time.
    """

    basis: int
    product: int
    orthogonalization: int
    host: int
    results: int
    linearization: int
    peak: int


def forecast_bytes(
    op: Operator, k: int, block: int, rows: int, dtype: Any, keep: bool, clock: Clock
) -> Bytes:
    """The memory of a block Lanczos solve. Compiles what the solve will run.

    Args:
        op: the operator.
        k: wanted pairs.
        block: vectors per product.
        rows: of the basis.
        dtype: of the basis.
        keep: whether eigenvectors are returned.
        clock: charged for the compilation.
    """
    n = op.shape[0]
    basis = jax.ShapeDtypeStruct(storage.shape(rows, n, dtype), dtype)
    vectors = jax.ShapeDtypeStruct((block, n), op.dtype)
    zero, seed = np.int32(0), np.zeros(2, np.uint32)
    work = programs.orthonormalize.work_bytes(clock, basis, vectors, zero, seed)
    rotation = jax.ShapeDtypeStruct((rows, rows), np.dtype(np.float64))
    orthogonalization = max(
        _size(vectors) + work, programs.rotate.work_bytes(clock, basis, rotation, zero, zero)
    )
    product = _product_bytes(op, vectors, clock)
    results = k * n * op.dtype.itemsize if keep else 0
    taken = k * _size(basis) // rows if keep else 0
    host = _HOST_MATRICES * 8 * rows**2
    return Bytes(
        basis=_size(basis),
        product=product,
        orthogonalization=orthogonalization,
        host=host,
        results=results,
        linearization=getattr(op, "residual_bytes", 0),
        peak=max(
            _size(basis) + _beside(op, host) + max(product, orthogonalization, taken),
            taken + results,
        ),
    )


def forecast_dense_bytes(op: Operator, k: int, block: int, keep: bool, clock: Clock) -> Bytes:
    """The memory of forming the whole matrix and decomposing it on the host."""
    n = op.shape[0]
    vectors = jax.ShapeDtypeStruct((block, n), op.dtype)
    product, host = _product_bytes(op, vectors, clock), _HOST_MATRICES * 8 * n**2
    return Bytes(
        basis=0,
        product=product,
        orthogonalization=0,
        host=host,
        results=k * n * op.dtype.itemsize if keep else 0,
        linearization=getattr(op, "residual_bytes", 0),
        peak=_beside(op, host) + product,
    )


def forecast_matvecs(k: int, block: int, rows: int, certify: str) -> tuple[int, int]:
    """Products of a solve and of its verification, for spectra like a network's.

    That is a few outliers, a bulk at zero, and a negative tail.

    At a tolerance of 1e-3 such spectra took between 2k + 4 and 2k + 20 products with block 1, by
    the gaps between their outliers; this is the middle. A tenth of the tolerance costs 10 % more,
    ten times as much saves 25 %. Restarts cost nothing with 10 blocks beyond the k wanted rows, and
    half as much again with the fewest, 4. A spectrum without outliers takes many times more.

    Args:
        k: wanted pairs.
        block: vectors per product.
        rows: of the basis.
        certify: see `eigsh`. A search takes half as many products as the solve, and verifies again.
    """
    lacking = max(0.0, 1 - (rows - k) / (10 * block)) / 0.6
    needed = (2 * k + 12) * block_penalty(block) * (1 + 0.5 * lacking**2)
    solve, pairs = (-(-math.ceil(count) // block) * block for count in (needed, k))
    if certify == "sampled":
        return solve, SAMPLES
    complete = (solve + solve // 2, 2 * pairs)
    return complete if certify == "complete" else (solve, pairs)


def _product_bytes(op: Operator, vectors: jax.ShapeDtypeStruct, clock: Clock) -> int:
    return _size(vectors) + programs.multiply.work_bytes(clock, op, vectors)


def _beside(op: Operator, host: int) -> int:
    """What the small matrices on the host take of the memory that the basis is in."""
    return 0 if on_device(op) else host


def _size(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
