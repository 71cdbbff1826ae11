"""Linear solves with a damped operator, as for natural gradients and influence functions."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.linalg import eigvalsh_tridiagonal, norm
from scipy.sparse.linalg import LinearOperator, cg, minres

from curvax.arrays import reject_tracers, scale_of
from curvax.checks import check_choice, check_integer, check_number
from curvax.device.programs import multiply
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.lanczos_tridiagonal import lanczos_tridiagonal
from curvax.krylov.scaling import check_range, exponent_of, in_range, is_safe
from curvax.operators.base import Operator
from curvax.operators.conversion import OperatorLike, as_operator, identity, original_errors
from curvax.operators.evidence import report_nonfinite
from curvax.operators.vectors import read_vector
from curvax.options import takes_options
from curvax.program import Clock
from curvax.results import SolveResult
from curvax.results.units import times
from curvax.typing import Float64Array, Vector
from curvax.warnings import warn

_SOLVERS = {"cg": cg, "minres": minres}

# Steps of the recurrence that looks for negative curvature where conjugate gradients failed.
_CHECKED = 30


@takes_options()
def solve(
    A: OperatorLike,
    b: Vector,
    *,
    damping: float = 0.0,
    method: Literal["cg", "minres"] = "cg",
    tol: float = 1e-5,
    max_matvecs: int | None = None,
) -> SolveResult:
    """Solve `(A + damping·I) x = b`.

    The iterations are SciPy's, on float64 vectors in the memory of the host; the products are the
    operator's. The residual is measured afterwards with the operator itself.

    Args:
        A: see `eigsh`.
        b: the right-hand side, a vector as of the operator or flat `(n,)`, such as a gradient.
        damping: added to every eigenvalue; not negative.
        method: `"cg"` for positive definite `A + damping·I`, as a damped GGN or Fisher;
            `"minres"` for any, as a Hessian with negative eigenvalues (Paige and Saunders 1975).
        tol: allowed `‖b − (A + damping·I) x‖ / ‖b‖`.
        max_matvecs: the most products of the iteration, whose result is measured by a few more; by
            default `min(10 n, 1000)`.

    Returns:
        The solution with its measured residual; a `ConvergenceWarning` if that is above `tol`.
        After Ctrl-C: the iterate so far, and an `InterruptWarning`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, b zero or not finite; or, where the residual stays
            above `tol`, an operator measured not to be symmetric or, for `"cg"`, `A + damping·I`
            measured not to be positive definite.
        FloatingPointError: a product or the solution is not finite, or depends on numbers read as
            zero.
        MemoryError: memory ran out on the way.
        RuntimeError: a compiled kernel could not be run.
    """
    reject_tracers("solve", A, b)
    op, clock = as_operator(A), Clock("products", "host", "verification")
    check_choice("method", method, tuple(_SOLVERS))
    damping, tol = check_number("damping", damping), check_number("tol", tol)
    limit = check_integer("max_matvecs", max_matvecs, low=1) or min(10 * op.shape[0], 1000)
    rhs, size = _in_range(_flat(op, b))
    damped = op + damping * identity(op)

    def attempt(scaled: Operator) -> SolveResult:
        with clock.part("host"):
            x, made = _iterate(_SOLVERS[method], scaled, rhs, tol, limit, interrupted, clock)
        with clock.part("verification"):
            product = multiply(clock, scaled, jnp.copy(x)[None])[0]
            residual, verifying = float(_relative_residual(rhs, product)), 1
        if not np.isfinite(residual):
            raise FloatingPointError(
                "the solution is not finite, the products of A are: raise damping"
            )
        if residual > tol and not interrupted:
            with clock.part("verification"):
                verifying += _check_operator(damped, rhs, damping, method, made)
            warn(
                f"the relative residual is {residual:.2g} after {made} products, above "
                f"tol={tol:g}: raise max_matvecs or damping"
            )
        return SolveResult(
            x=op.unravel(_delivered(x, size + exponent_of(scaled))),
            relative_residual=residual,
            converged=residual <= tol,
            tol=tol,
            damping=damping,
            method=method,
            num_matvecs=made,
            num_verification=verifying,
            seconds=clock.parts(),
            interrupted=bool(interrupted),
        )

    explained = Explained(op)
    with InterruptFlag() as interrupted, kept(), explained, original_errors(op):
        return in_range(damped, attempt, lambda result, exponent: result)


def _in_range(b: Array) -> tuple[Array, int]:
    """A right-hand side that can be computed with, and the e for which b is `2**e` times that."""
    exponent = math.frexp(float(np.abs(np.asarray(b)).max()))[1]
    return (b, 0) if is_safe(b.dtype, 2.0**exponent) else (times(b, -exponent), exponent)


def _delivered(x: Array, exponent: int) -> Array:
    """`2**exponent · x`.

    Raises:
        FloatingPointError: it overflows, or has lost digits to underflow.
    """
    largest = float(np.abs(np.asarray(x)).max())
    if exponent == 0 or largest == 0:
        return x
    size = math.log2(largest) + exponent
    limits = np.finfo(x.dtype)
    if not limits.minexp - limits.machep <= size < limits.maxexp:
        raise FloatingPointError(
            f"the solution, of the size of 2**{size:.0f}, leaves the range of {x.dtype}: multiply "
            "b by a power of two, and divide x by it"
        )
    delivered: Array = times(x, exponent)
    return delivered


def _flat(op: Operator, b: Vector) -> Array:
    flat = read_vector(op.space, b, "b")
    host = np.asarray(flat)  # where the smallest numbers are not read as zero
    if not np.isfinite(host).all() or not host.any():
        raise ValueError("b must be finite and not zero")
    return flat


class _Stop(Exception):
    """Ends SciPy's iteration."""


def _iterate(
    solver: Any,
    op: Operator,
    b: Array,
    tol: float,
    limit: int,
    interrupted: InterruptFlag,
    clock: Clock,
) -> tuple[Array, int]:
    """The solution and the products made. The vectors are float64, the products of the operator."""
    made, longest = 0, 0.0

    def product(v: Float64Array) -> np.ndarray:
        nonlocal made, longest
        if interrupted:
            raise _Stop
        made += 1
        with clock.part("products"):
            # A copy: what `multiply` consumes must not share the memory of SciPy's vector.
            result = np.asarray(multiply(clock, op, jnp.array(v, op.dtype)[None])[0])
        if not np.isfinite(result).all():
            report_nonfinite(op, jnp.asarray(result)[None], made)
        if v.any():
            # Of BLAS, whose squares stay in range.
            length = float(norm(result.astype(np.float64)) / norm(v))
            longest = max(longest, length)
            check_range(op, longest)
        return result

    rhs = np.asarray(b, np.float64)
    matrix = LinearOperator(op.shape, product, dtype=np.float64)
    x, inner = np.zeros_like(rhs), tol / 2

    def note(iterate: Float64Array) -> None:
        nonlocal x
        x = iterate

    # MINRES stops at a residual relative to ‖A‖‖x‖: it goes on from there until it is met.
    with contextlib.suppress(_Stop):
        while made < limit:
            x, _ = solver(matrix, rhs, x0=x, rtol=inner, maxiter=limit - made, callback=note)
            rest = float(np.linalg.norm(rhs - product(x)))
            if rest <= tol * np.linalg.norm(rhs) or inner < np.finfo(np.float64).eps:
                break
            inner /= 10
    return jnp.asarray(x, b.dtype), made


@jax.jit
def _relative_residual(b: Array, product: Array) -> Array:
    largest = scale_of(b)
    rest = (b - product) / largest
    return jnp.linalg.norm(rest) / jnp.linalg.norm(b / largest)


def _check_operator(op: Operator, b: Array, damping: float, method: str, made: int) -> int:
    """Refuse an operator that the method, which failed, is not for; the products that this took.

    That is one not symmetric, or, for conjugate gradients, with a negative Ritz value in their
    Krylov space. It takes no more products than the `made` of the solve.

    Raises:
        ValueError: it is one.
    """
    recurrence = lanczos_tridiagonal(op, min(_CHECKED, made, op.shape[0]), v0=b)
    values = eigvalsh_tridiagonal(recurrence.alphas, recurrence.betas)
    if method == "cg" and values[0] < -100 * np.finfo(op.dtype).eps * np.abs(values).max():
        raise ValueError(
            f"method='cg' needs a positive definite A + damping*I, but a Ritz value is "
            f"{values[0]:.3g}: take method='minres', or damping above {damping - values[0]:.3g}"
        )
    return recurrence.num_matvecs
