"""Stochastic Lanczos quadrature: the spectral measure, seen from random starts.

A start z uniform on the unit sphere has the spectral measure `Σ (uᵢᵀz)² δ(λᵢ)`, whose mean over all
starts is the measure that puts 1/n on each eigenvalue; so `n zᵀ f(A) z` has the mean `tr f(A)`. The
eigenvalues of the tridiagonal T of m Lanczos steps, and the squared first entries of its
eigenvectors, are the Gauss quadrature of the measure of that start, exact for polynomials of degree
up to 2m − 1 (G. Golub and J. Welsch, Math. Comp. 23, 1969). S. Ubaru, J. Chen and Y. Saad, "Fast
estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl. 38 (2017).

The masses `(uᵢᵀz)²` are Dirichlet distributed with all parameters 1/2, so that the variance over
the starts is known: with μ the mean measure, `var zᵀf(A)z = 2/(n + 2) · (∫f² dμ − (∫f dμ)²)`. The
quadratures of all runs together give it far better than the spread of a few runs does.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jax import Array

from curvax.checks import check_count, check_seed
from curvax.device.probes import draw
from curvax.device.probing import project_off
from curvax.estimators import arguments
from curvax.estimators.deflation import Deflation
from curvax.interrupt import InterruptFlag
from curvax.krylov.recurrence import Recurrence, normalize
from curvax.operators.base import Operator
from curvax.program import Clock
from curvax.typing import Float64Array


class Quadrature(NamedTuple):
    """A measure of mass 1.

    Attributes:
        nodes: `(j,)` ascending, the Ritz values.
        weights: `(j,)`, of sum 1.
        residuals: `(j,)` of the Ritz pairs: an eigenvalue lies within this distance of each node.
    """

    nodes: Float64Array
    weights: Float64Array
    residuals: Float64Array


def gauss(alphas: Float64Array, betas: Float64Array) -> Quadrature:
    """The quadrature of a Lanczos run: αs `(j,)`, and βs `(j,)` with the last coupling."""
    # The driver with QR iterations, for its orthogonal eigenvectors.
    nodes, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas[:-1], lapack_driver="stev")
    return Quadrature(nodes, vectors[0] ** 2, np.abs(betas[-1] * vectors[-1]))


def radau(alphas: Float64Array, betas: Float64Array, end: float) -> Quadrature:
    """The Gauss-Radau quadrature of a Lanczos run, with one node more at the end of the spectrum.

    Of a function whose derivatives of even order are negative, as of the logarithm, the Gauss
    quadrature is an upper bound of the integral and, with `end` at or below the whole spectrum,
    this a lower one (G. Golub and G. Meurant, "Matrices, Moments and Quadrature", 2010, sections
    6.2 and 6.3).

    Args:
        alphas: `(j,)`.
        betas: `(j,)`, with the last coupling.
        end: below all Ritz values.
    """
    # With one more row, T has the eigenvalue `end` for α = end + β² (T − end)⁻¹_jj.
    nodes, _, residuals = gauss(alphas, betas)
    last = end + np.sum(residuals**2 / (nodes - end))
    return gauss(np.append(alphas, last), np.append(betas, 0.0))


@dataclasses.dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        num_runs: random starts.
        num_steps: products for each, no more than the space has dimensions.
        block_size: runs side by side.
        seed: start i depends on the seed and on i alone.
        deflation: the eigenpairs left out.
        atoms: `(k,)` float64, their eigenvalues.
        coupling: `‖A X − X Θ‖` of their vectors X and values Θ, or more.
    """

    num_runs: int
    num_steps: int
    block_size: int
    seed: int
    deflation: Deflation
    atoms: Float64Array
    coupling: float


def check_request(
    op: Operator,
    clock: Clock,
    num_runs: Any,
    num_steps: Any,
    deflate: Any,
    seed: Any,
    block_size: Any,
) -> Request:
    """Check arguments, and by their products the pairs to leave out.

    Raises:
        TypeError: one of a wrong type.
        ValueError: one out of range, or pairs that have not converged or are not the operator's.
    """
    runs = check_count("num_runs", num_runs, low=1)
    steps = check_count("num_steps", num_steps, low=1)
    block = min(arguments.check_block(block_size, op.shape[0]), runs)
    seed = check_seed(seed)
    deflation = Deflation.of(op, deflate, block, clock)
    if deflate is not None and not deflate.all_converged:
        raise ValueError(
            f"deflate must hold converged pairs, but {int(np.sum(~deflate.converged))} of "
            f"{deflation.count} are not: solve with a larger tol or max_matvecs, or for fewer pairs"
        )
    steps = min(steps, op.shape[0] - deflation.count)
    coupling = float(np.linalg.norm(deflation.leaks))
    return Request(runs, steps, block, seed, deflation, deflation.atoms, coupling)


def lanczos_runs(
    op: Operator,
    request: Request,
    clock: Clock,
    interrupted: InterruptFlag,
    note: Callable[[int, int], None],
) -> Iterator[list[tuple[Float64Array, Float64Array]]]:
    """The αs and βs of all runs, block by block of those that go side by side.

    Three blocks of vectors are held, whatever the number of steps.

    Args:
        op: the operator.
        request: what to run.
        clock: with the parts `products`, `recurrence` and `host`.
        interrupted: looked at after every step. Runs that are not finished by then are left out,
            unless there are no others.
        note: called after every step with the vectors multiplied and the runs finished so far.
    """
    made = runs = 0
    while runs < request.num_runs and not (interrupted and runs):
        like = np.zeros(min(request.block_size, request.num_runs - runs), np.int32)
        start = _starts(clock, op, like, request, runs)
        recurrence = Recurrence(op, start, clock, request.deflation.vectors)
        del start  # the recurrence needs it for one step
        while True:
            recurrence.step()
            finished = recurrence.steps == request.num_steps or bool(recurrence.ended.all())
            made += len(like)
            note(made, runs + finished * len(like))
            if finished or interrupted:
                break
        coefficients = [recurrence.coefficients(i) for i in range(len(like))]
        del recurrence  # its vectors make room for the next starts
        if finished or not runs:
            runs += len(like)
            yield coefficients


def _starts(clock: Clock, op: Operator, like: Any, request: Request, first: int) -> Array:
    """Unit vectors, uniform on the sphere of the space that is not left out."""
    block = draw(clock, op, like, request.seed, first, "gaussian")
    if request.deflation.vectors is not None:
        block = project_off(clock, request.deflation.vectors, block)
    return normalize(clock, block)


def mean_and_variance(
    each: list[Quadrature], f: Callable[[Float64Array], Float64Array], dimension: int
) -> tuple[float, float]:
    """The mean of `zᵀf(A)z` over the runs, and its variance over all starts."""
    values = [f(q.nodes) for q in each]
    mean = float(np.mean([q.weights @ v for q, v in zip(each, values, strict=True)]))
    squares = [q.weights @ (v - mean) ** 2 for q, v in zip(each, values, strict=True)]
    return mean, 2 * float(np.mean(squares)) / (dimension + 2)
