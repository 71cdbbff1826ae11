"""The diagonal by n products of unit vectors."""

import math

import jax.numpy as jnp
import numpy as np

from curvax.device import probing, programs
from curvax.estimators.arguments import check_block
from curvax.estimators.sampling import Sampling
from curvax.krylov.scaling import check_range
from curvax.memory import SHARE, available_bytes
from curvax.operators.base import Operator
from curvax.operators.evidence import report_nonfinite
from curvax.program import Clock, host
from curvax.typing import FloatArray

# A larger chunk only adds to memory: small products are bound by the cost of a call, which 64
# vectors share, and large ones by arithmetic.
_MOST_ROWS = 64
_MOST_ELEMENTS = 1 << 22


def chunk_size(op: Operator, clock: Clock) -> int:
    """Unit vectors per product: as many as make calls cheap, or as memory allows."""
    n = op.shape[0]
    rows = min(n, max(check_block("auto", n), min(_MOST_ROWS, _MOST_ELEMENTS // n)))
    first = np.int32(0)
    while rows > 1:
        need = probing.unit_entries.work_bytes(clock, op, jnp.zeros(rows, jnp.int32), first)
        if need <= SHARE * available_bytes(op):
            break
        rows //= 2
    return rows


def exact_diagonal(sampling: Sampling) -> tuple[FloatArray, float]:
    """The diagonal of an operator, from n unit vectors; what is noted is its sum.

    Returns:
        `(n,)`, NaN where an interrupt came first; the Frobenius norm of the rows that were made.

    Raises:
        FloatingPointError: a product is not finite.
        OutOfRange: see `check_range`.
    """
    op, clock, rows = sampling.op, sampling.clock, sampling.settings.block
    n, like = op.shape[0], jnp.zeros(rows, jnp.int32)
    entries = np.full(n, np.nan, op.dtype)
    total, size, longest = 0.0, 0.0, 0.0
    for begin in range(0, n, rows):
        # The last chunk overlaps the one before: one program serves all.
        first = min(begin, n - rows)
        with clock.part("products"):
            found, norms = (
                np.asarray(x) for x in probing.unit_entries(clock, op, like, host(np.int32(first)))
            )
        if not np.isfinite(norms).all():
            number = first + int(np.flatnonzero(~np.isfinite(norms))[0])
            unit = jnp.zeros((1, n), op.dtype).at[0, number].set(1)
            report_nonfinite(op, programs.multiply(clock, op, unit), number + 1)
        end = min(begin + rows, n)
        longest = max(longest, float(norms.max()))
        size = math.hypot(size, *norms[begin - first : end - first].tolist())
        entries[begin:end] = found[begin - first : end - first]
        total += float(np.sum(entries[begin:end], dtype=np.float64))
        sampling.matvecs = end
        sampling.note(total, 0.0 if end == n else math.inf)
        if sampling.interrupted:
            break
    check_range(op, longest)
    return entries, size
