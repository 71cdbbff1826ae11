"""`lanczos_tridiagonal`: the Lanczos recurrence itself."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import reject_tracers
from curvax.checks import check_count, check_flag, check_seed
from curvax.device import probing
from curvax.device.probes import draw
from curvax.device.programs import (
    check_products,
    empty_basis,
    multiply,
    orthonormalize,
    unpack,
)
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.recurrence import BREAKDOWN, Recurrence, normalize
from curvax.krylov.scaling import check_range, in_range
from curvax.krylov.start import unit_vectors
from curvax.memory import check_fits
from curvax.operators.base import Operator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.operators.evidence import check_symmetry, report_nonfinite
from curvax.operators.vectors import read_vector
from curvax.options import takes_options
from curvax.program import Clock, host
from curvax.results import LanczosTridiagonal
from curvax.typing import Float64Array, Vector


@takes_options()
def lanczos_tridiagonal(
    A: OperatorLike,
    num_steps: int,
    *,
    v0: Vector = None,
    reorthogonalize: bool = False,
    return_basis: bool = False,
    seed: int | None = None,
) -> LanczosTridiagonal:
    """Make Lanczos steps from one vector, and return the tridiagonal matrix.

    Args:
        A: a curvax operator, a dense or SciPy sparse symmetric array, or anything with `shape`,
            `dtype` and `matvec`.
        num_steps: Lanczos steps, at least 1. No more are made than the space has dimensions: n.
        v0: where to start, a vector; random if None.
        reorthogonalize: whether to keep the vectors, and to make each orthogonal to those before
            it. T is then the projection `Q A Qᵀ` to rounding. Otherwise three vectors are held, and
            T is what the plain recurrence gives: its eigenvalues come to hold copies, "ghosts", of
            those of A that have converged, but its quadrature (eigenvalues, and squared first
            entries of the eigenvectors) is right.
        return_basis: whether to return the vectors, and so to keep them.
        seed: seed of the random start. Drawn if None, and recorded in the result.

    Returns:
        T, and the coupling to the vector after the last. It has fewer rows than `num_steps` where
        the Krylov space is invariant (`last_beta` is then 0), or after Ctrl-C.

    Raises:
        TypeError: an argument of a wrong type, or a call inside a transformation such as `jit`.
        ValueError: `num_steps` below 1, a `v0` that is not one finite vector other than zero, or an
            operator measured, from the second step on, not to be symmetric.
        FloatingPointError: a product is not finite, or depends on numbers read as zero.
        MemoryError: the vectors to be kept do not fit in the free memory, or
            memory ran out on the way.
        RuntimeError: a compiled kernel could not be run.

    References:
        C. Paige, "Computational variants of the Lanczos method for the eigenproblem", J. Inst.
        Math. Appl. 10 (1972); G. Golub and C. Van Loan, "Float64Array Computations"
        (2013), section 10.3.
    """
    reject_tracers("lanczos_tridiagonal", A, v0)
    op = as_operator(A)
    steps = min(check_count("num_steps", num_steps, low=1), op.shape[0])
    keep = check_flag("return_basis", return_basis)
    full = check_flag("reorthogonalize", reorthogonalize)
    drawn = check_seed(seed)
    clock = Clock("products", "recurrence", "host")
    if keep or full:
        _check_memory(op, steps)
    make = _reorthogonalized if full else _plain
    smaller = ["lower num_steps"] if keep or full else []
    explained = Explained(op, smaller)
    with InterruptFlag() as interrupted, kept(), explained, original_errors(op):

        def attempt(scaled: Operator) -> LanczosTridiagonal:
            start = _start(scaled, v0, drawn, clock)
            alphas, betas, basis = make(scaled, start, steps, keep, interrupted, clock)
            return LanczosTridiagonal(
                alphas=alphas,
                betas=betas[:-1],
                last_beta=float(betas[-1]),
                basis=basis,
                num_matvecs=len(alphas),
                seed=drawn if v0 is None else None,
                seconds=clock.parts(),
                interrupted=bool(interrupted),
            )

        return in_range(op, attempt)


def _plain(
    op: Operator, start: Array, steps: int, keep: bool, interrupted: InterruptFlag, clock: Clock
) -> tuple[Float64Array, Float64Array, Array | None]:
    """αs `(j,)`, βs `(j,)` with the last coupling, and the basis if it is to be kept."""
    recurrence = Recurrence(op, start, clock)
    basis = empty_basis(clock, (steps, op.shape[0]), op.dtype) if keep else None
    while recurrence.steps < steps and not recurrence.ended.all():
        if basis is not None:
            row = np.int32(recurrence.steps)
            basis = probing.store(clock, basis, recurrence.current, host(row))
        recurrence.step()
        if interrupted:
            break
    alphas, betas = recurrence.coefficients(0)
    return alphas, betas, _first_rows(basis, len(alphas))


def _reorthogonalized(
    op: Operator, start: Array, steps: int, keep: bool, interrupted: InterruptFlag, clock: Clock
) -> tuple[Float64Array, Float64Array, Array | None]:
    """As `_plain`, with every vector made orthogonal to those before it. Holds these and one."""
    check_products(clock, op, start)
    basis, seed = jnp.zeros((steps, op.shape[0]), op.dtype), np.zeros(2, np.uint32)
    basis, current, *_ = orthonormalize(clock, basis, start, host(np.int32(0)), host(seed))
    alphas: list[float] = []
    betas: list[float] = []
    longest = 0.0
    while not interrupted or not alphas:
        used = len(alphas) + 1
        product = multiply(clock, op, current)
        if used == steps:
            alpha, beta = _last_coefficients(basis, product, clock)
            # n vectors span everything; else β, if it is nothing but rounding, is zero.
            scale = max(abs(alpha), beta, *map(abs, alphas), *betas)
            negligible = beta <= BREAKDOWN * float(jnp.finfo(op.dtype).eps) * scale
            beta = 0.0 if negligible or steps == op.shape[0] else beta
        else:
            basis, following, numbers = orthonormalize(
                clock, basis, product, host(np.int32(used)), host(seed)
            )
            column, factor, info = unpack(np.asarray(numbers)[0], 1)
            # A direction that was rounding noise has been replaced by a random one.
            alpha, beta = float(column[used - 1, 0]), 0.0 if info[1] else float(factor[0, 0])
            if betas:
                largest = max(abs(alpha), *map(abs, alphas), *betas)
                check_symmetry(abs(float(column[used - 2, 0]) - betas[-1]), largest)
        if not math.isfinite(alpha + beta):
            report_nonfinite(op, multiply(clock, op, basis[used - 1 : used]), used)
        longest = max(longest, math.hypot(alpha, beta, betas[-1] if betas else 0.0))
        check_range(op, longest)
        alphas.append(alpha)
        betas.append(beta)
        if used == steps or beta == 0:
            break
        current = following
    kept = basis if keep else None
    return np.asarray(alphas), np.asarray(betas), _first_rows(kept, len(alphas))


def _last_coefficients(basis: Array, product: Array, clock: Clock) -> tuple[float, float]:
    """The last α, and the β to a vector that is not kept."""
    alpha = float(np.asarray(probing.inner(clock, basis, product))[-1, 0])
    for _ in range(2):
        product = probing.project_off(clock, basis, product)
    squares = np.asarray(probing.forms(clock, product, product)[1])
    return alpha, math.sqrt(squares[0])


def _first_rows(basis: Array | None, count: int) -> Array | None:
    return basis if basis is None or len(basis) == count else basis[:count]


def _start(op: Operator, v0: Vector, seed: int, clock: Clock) -> Array:
    """A unit vector, `(1, n)`."""
    if v0 is None:
        vectors = draw(clock, op, jnp.zeros(1, jnp.int32), seed, 0, "gaussian")
    else:
        vectors = unit_vectors(op, read_vector(op.space, v0, "v0"))
    return normalize(clock, vectors)


def _check_memory(op: Operator, steps: int) -> None:
    check_fits(
        steps * op.shape[0] * op.dtype.itemsize,
        op,
        f"{steps} vectors of {op.shape[0]} numbers need",
        "lower num_steps, or keep none (reorthogonalize=False, return_basis=False)",
    )
