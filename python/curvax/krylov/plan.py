"""`plan`: what a solve will need, and how to fit it into the memory there is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Unpack

import jax
import numpy as np

from curvax.arrays import reject_tracers
from curvax.checks import check_integer
from curvax.device import storage
from curvax.device.programs import check_products, solve_clock
from curvax.krylov.forecast import (
    Bytes,
    forecast_bytes,
    forecast_dense_bytes,
    forecast_matvecs,
)
from curvax.krylov.request import PlanOptions, Request
from curvax.krylov.sizes import (
    comfortable_rows,
    default_block,
    default_rows,
    fastest_block,
    fewest_rows,
    matvec_limit,
)
from curvax.memory import Memory, host_bytes, memory_of, on_device, readable
from curvax.operators.base import Operator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.operators.curvature import Curvature
from curvax.operators.failures import alternatives
from curvax.options import takes_options
from curvax.program import Clock
from curvax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What `eigsh` needs, with the arguments that a plan is for.

    Attributes:
        n: number of parameters.
        k: wanted pairs.
        block_size: vectors per product.
        max_basis: rows of the basis.
        basis_dtype: how they are stored.
        dense: whether the whole matrix is formed instead, which n products do.
        num_matvecs: forecast products of the solve.
        num_verification: forecast products of its verification.
        max_matvecs: the most products of the solve.
        bytes: forecast memory, and its parts.
        limit: bytes by which the memory may grow.
    """

    n: int
    k: int
    block_size: int
    max_basis: int
    basis_dtype: np.dtype
    dense: bool
    num_matvecs: int
    num_verification: int
    max_matvecs: int
    bytes: Bytes
    limit: int

    @property
    def fits(self) -> bool:
        """Whether the memory stays within the limit."""
        return self.bytes.peak <= self.limit

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """A table: the arguments, the products, and the memory part by part."""
        size = self.bytes
        how = f"a basis of {self.max_basis} vectors in {self.basis_dtype.name}"
        if self.dense:
            how = "the whole matrix"
        products = f"{self.num_matvecs} + {self.num_verification}"
        parts = [
            ("basis", size.basis),
            ("product, work space", size.product),
            ("orthogonalisation, work space", size.orthogonalization),
            ("small matrices, on the host", size.host),
            ("results", size.results),
            ("peak: what is alive at once", size.peak),
            ("limit", self.limit),
            ("held before, linearisation residuals", size.linearization),
        ]
        return "\n".join(
            [
                f"{self.k} eigenpairs of {self.n:,} parameters from {how}, block size "
                f"{self.block_size}: {'fits' if self.fits else 'DOES NOT FIT'}",
                f"  {'products, to solve and to verify':<38} {products:>12}",
                *(f"  {name:<38} {readable(count):>12}" for name, count in parts),
            ]
        )


@takes_options(PlanOptions)
def plan(
    A: OperatorLike,
    k: int | tuple[int, int],
    *,
    basis_dtype: DTypeLike = "auto",
    limit: int | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Forecast the memory and the products of `eigsh`, and choose what is left open to fit.

    The memory is read from the compiled programs, which `eigsh` does not compile again: called with
    the plan's `block_size`, `max_basis` and `basis_dtype`, it does what the plan says. The number
    of products is that of a spectrum like a network's.

    Args:
        A: see `eigsh`.
        k: see `eigsh`.
        basis_dtype: see `eigsh`, but chosen if left out: the operator's dtype if
            `k + 10·block_size` rows of it fit, else float16 if `tol` allows it.
        limit: bytes by which the memory of the process, or of a GPU, may grow. By default what is
            free; for more than the smallest basis, though, 95 % of that on a GPU, which the product
            and the basis share by what each needs, and 40 % on a CPU, which serves other programs
            too.
        **options: `which`, `tol`, `block_size`, `max_basis`, `certify` and `return_eigenvectors`,
            with the meanings and defaults that they have in `eigsh`.

    Returns:
        The plan, whether it fits or not.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, or products that come in shards.
        RuntimeError: a GPU whose free memory is not known; the message names the remedy.
    """
    reject_tracers("plan", A)
    op = as_operator(A)
    with original_errors(op):
        request = Request.of(op, k, basis_dtype=basis_dtype, **options)
        return choose(op, request, solve_clock(), check_integer("limit", limit, low=0))


def choose(op: Operator, request: Request, clock: Clock, limit: int | None = None) -> Plan:
    """The first of the ways of preference that fits, or the last, which needs least.

    Args:
        op: the operator.
        request: checked arguments.
        clock: charged for the compilation.
        limit: bytes; None for what is free.

    Raises:
        ValueError: `max_basis` or `max_matvecs` is too small for the block, or products that would
            come in shards.
    """
    if limit is None:
        memory = memory_of(op)
        free, budget = memory.free, memory.shareable
    else:
        free, budget = limit, limit
    chooser = _Chooser(op, request, clock, free)
    for block in chooser.blocks():
        for dtype, fewest, most in chooser.bases(block):
            found = chooser.largest(block, dtype, fewest, most, budget)
            if found.bytes.peak <= budget:
                return found
    return found


def choose_to_fit(op: Operator, request: Request, clock: Clock) -> Plan:
    """As `choose`, for a solve that begins now.

    Raises:
        MemoryError: it would not fit in what is free.
    """
    plan = choose(op, request, clock)
    if not plan.fits:
        raise MemoryError(
            f"the solve needs {readable(plan.bytes.peak)}, but {readable(plan.limit)} are free: "
            f"{remedy(op, plan, memory_of(op))}. The forecast:\n{plan}"
        )
    # Beside a device the forecast's limit does not count them.
    if on_device(op) and plan.bytes.host > host_bytes():
        raise MemoryError(
            f"the small matrices of the solve need {readable(plan.bytes.host)} on the host, but "
            f"{readable(host_bytes())} are free there: lower max_basis ({plan.max_basis}). The "
            f"forecast:\n{plan}"
        )
    return plan


@dataclasses.dataclass(frozen=True)
class _Chooser:
    op: Operator
    request: Request
    clock: Clock
    free: int

    def blocks(self) -> list[int]:
        """The block sizes to try."""
        asked, k = self.request.block_size, self.request.wanted.k
        if asked == "auto":
            return list(dict.fromkeys([default_block(k), 1]))
        return [fastest_block(self.op, self.clock) if isinstance(asked, str) else asked]

    def bases(self, block: int) -> Iterator[tuple[np.dtype, int, int]]:
        """How to store the basis, with the fewest and the most rows, by preference.

        The operator's dtype loses nothing, so a basis of it that is merely smaller than usual
        comes first, down to a size where restarts cost nothing. Below it they cost products, while
        float16 costs none where `tol` is above its floor, and has twice the rows in the same
        memory. bfloat16 takes as much memory as float16 and is eight times as coarse.
        """
        request, n = self.request, self.op.shape[0]
        fewest, comfortable, most = (
            min(rows(request.wanted.k, block), n)
            for rows in (fewest_rows, comfortable_rows, default_rows)
        )
        # A Krylov space is no larger than the rank and a block; a block more, and one that follows.
        most = min(most, max(comfortable, self.op.rank_bound + 4 * block))
        if request.max_basis is not None:
            if request.max_basis < fewest:
                raise ValueError(
                    f"max_basis must be at least k + 4*block_size = {fewest}, got "
                    f"{request.max_basis}"
                )
            fewest = comfortable = most = min(request.max_basis, n)
        if request.basis_dtype is not None:
            yield request.basis_dtype, fewest, most
            return
        yield self.op.dtype, comfortable, most
        half = np.dtype(np.float16)
        # A sample is charged with the roundings of all pairs.
        pairs = request.wanted.k if request.certify == "sampled" else 1
        floor = storage.floor(half) * math.sqrt(pairs)
        narrow = self.op.dtype == np.float32 and request.tol >= floor
        yield half if narrow else self.op.dtype, fewest, most

    def largest(self, block: int, dtype: np.dtype, fewest: int, most: int, budget: float) -> Plan:
        """The plan with the most rows within the budget, or with the fewest."""
        top = self.plan(block, dtype, most)
        if top.bytes.peak <= budget or fewest == most:
            return top
        found = self.plan(block, dtype, fewest)
        # As the largest of functions linear in the rows, the peak lies below its chords.
        while found.bytes.peak <= budget:
            slope = (top.bytes.peak - found.bytes.peak) / (most - found.max_basis)
            more = int((budget - found.bytes.peak) / slope)
            if not more:
                break
            found, before = self.plan(block, dtype, found.max_basis + more), found
            if found.bytes.peak > budget:
                return before
        return found

    def plan(self, block: int, dtype: np.dtype, rows: int) -> Plan:
        """What these choices need."""
        request, n, k = self.request, self.op.shape[0], self.request.wanted.k
        keep = request.return_eigenvectors
        if 8 * rows * n >= 2**63:
            raise MemoryError(
                f"a basis of {rows} vectors of {n} numbers is beyond what can be addressed: lower "
                "max_basis or k"
            )
        most = matvec_limit(request.max_matvecs, k, block, n)
        dense = n <= min(rows, most)
        if dense:
            made, verifying = n, k
            bytes_ = forecast_dense_bytes(self.op, k, block, keep, self.clock)
        else:
            vectors = jax.ShapeDtypeStruct((block, n), self.op.dtype)
            check_products(self.clock, self.op, vectors)
            made, verifying = forecast_matvecs(k, block, rows, request.certify)
            bytes_ = forecast_bytes(self.op, k, block, rows, dtype, keep, self.clock)
        return Plan(
            n=n,
            k=k,
            block_size=block,
            max_basis=rows,
            basis_dtype=self.op.dtype if dense else dtype,
            dense=dense,
            num_matvecs=made,
            num_verification=verifying,
            max_matvecs=most,
            bytes=bytes_,
            limit=self.free,
        )


def remedy(op: Operator, plan: Plan, memory: Memory) -> str:
    """What to do where a plan does not fit: if its product alone does not, what shrinks that."""
    fewest, others = fewest_rows(plan.k, plan.block_size), plan.bytes.product <= plan.limit
    remedies = []
    if others and plan.max_basis > fewest:
        remedies.append(f"lower max_basis (at least {fewest})")
    if plan.block_size > 1:
        remedies.append("lower block_size")
    remedies += product_remedies(op)
    if others and plan.basis_dtype == np.float32 and not plan.dense:
        remedies.append("store the basis in 16 bits (basis_dtype='float16')")
    if others and plan.k > 1:
        remedies.append("lower k")
    remedies.append("lower the number of parameters by a filter (where=)")
    return alternatives([*remedies, *memory.remedies])


def product_remedies(op: Operator) -> list[str]:
    """What lets the products of an operator need less memory."""
    remedies = []
    if getattr(op, "residual_bytes", 0):
        remedies.append("keep no linearisation residuals (linearize=False)")
    if isinstance(op, Curvature):
        size = op.microbatch_samples
        larger = f"smaller microbatches (microbatch_size below {size})"
        remedies.append(f"take {larger if size > 1 else 'shorter samples'}")
    return remedies
