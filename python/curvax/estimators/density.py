"""`spectral_density`: the density of an operator's eigenvalues, with a confidence band."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from curvax.arrays import reject_tracers
from curvax.checks import check_callback, check_count, check_number
from curvax.estimators import arguments, resolution
from curvax.estimators.quadrature import (
    Quadrature,
    Request,
    check_request,
    gauss,
    lanczos_runs,
)
from curvax.heap import kept
from curvax.interrupt import InterruptFlag
from curvax.krylov.failures import Explained
from curvax.krylov.scaling import exponent_of, in_range
from curvax.operators.base import Operator
from curvax.operators.conversion import OperatorLike, as_operator, original_errors
from curvax.options import takes_options
from curvax.program import Clock
from curvax.results import DensityProgress, EigenResult, SpectralDensity
from curvax.results.smoothing import smoothed_density
from curvax.results.units import times
from curvax.warnings import warn

# The narrowest Gaussian that float64 resolves on a grid, relative to the largest point of it.
_NARROWEST = 1e-13


@takes_options()
def spectral_density(
    A: OperatorLike,
    *,
    num_runs: int = 10,
    num_steps: int = 80,
    width: float | None = None,
    deflate: EigenResult | None = None,
    seed: int | None = None,
    block_size: int | Literal["auto"] = "auto",
    callback: Callable[[DensityProgress], object] | None = None,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues by stochastic Lanczos quadrature.

    Each run makes Lanczos steps from a random start and gives a quadrature of the spectral measure;
    smoothed by a Gaussian of standard deviation `width`, their mean is the density, and the band is
    where the density, smoothed alike, lies with a probability of 0.95 at each point. No basis is
    stored: the memory is that of three vectors for each run in a block, whatever `num_steps` is.

    Args:
        A: a curvax operator, a dense or SciPy sparse symmetric array, or anything with `shape`,
            `dtype` and `matvec`.
        num_runs: random starts. The band narrows with the root of their number, times n.
        num_steps: Lanczos steps of each run, at least 2. No more are made than the space has
            dimensions: n, less the pairs of `deflate`. Twice as many resolve twice as much.
        width: standard deviation of the Gaussian, in units of the eigenvalues. By default it is
            that which the quadrature resolves: 0.75 of the distance between neighbouring nodes
            that 99 % of the mass does not exceed, where nodes that are single eigenvalues by their
            residuals (outliers, the zeros of a low rank) do not count. So the bulk sets it, not the
            range of the spectrum. The band allows for the random starts; what a smaller width shows
            beyond the resolution it does not know of.
        deflate: what `eigsh` returned for this operator: its values become atoms of mass 1/n, and
            the runs see the rest alone (one more pass over its vectors for each product), where
            they then resolve more.
        seed: seed of the starts. Run i depends on the seed and on i alone, to rounding whatever
            `block_size` is. Drawn if None, and recorded in the result.
        block_size: runs side by side, as one product of a block, up to 32. By default 1 on a CPU,
            else 4.
        callback: called with a `DensityProgress` after each step.

    Returns:
        The density on a grid, with its band, and the nodes, weights and residuals of every run;
        `cdf`, `quantile` and their intervals, which follow from these, are those of the
        eigenvalues, unsmoothed. `outliers` are the atoms, and eigenvalues further than three
        quartile distances beyond the quartiles on which four of five runs agree: copies of a
        multiple one are not told apart. After Ctrl-C: of the runs finished by then, or, if there
        are none, of those under way.

    Raises:
        TypeError: an argument of a wrong type, or a call inside a transformation such as `jit`.
        ValueError: an argument out of range, an operator measured not to be symmetric, or
            `deflate` holds pairs that have not converged, or are measured to be another operator's.
        FloatingPointError: a product is not finite, or depends on numbers read as zero.
        MemoryError: memory ran out on the way.
        RuntimeError: a compiled kernel could not be run.

    References:
        S. Ubaru, J. Chen and Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature", SIAM J. Matrix Anal. Appl. 38 (2017); T. Chen, T. Trogdon and S. Ubaru,
        "Analysis of stochastic Lanczos quadrature for spectrum approximation", ICML 2021.
    """
    reject_tracers("spectral_density", A, deflate)
    op = as_operator(A)
    chosen = None if width is None else check_number("width", width, positive=True)
    check_callback(callback)
    check_count("num_steps", num_steps, low=2)
    options = (num_runs, num_steps, deflate, seed, block_size)
    explained = Explained(op, block=arguments.check_block(block_size, op.shape[0]))
    with InterruptFlag() as interrupted, kept(), explained, original_errors(op):
        return in_range(
            op, lambda scaled: _estimate(scaled, chosen, callback, options, interrupted)
        )


def _estimate(
    op: Operator,
    width: float | None,
    callback: Callable[[DensityProgress], object] | None,
    options: tuple[Any, ...],
    interrupted: InterruptFlag,
) -> SpectralDensity:
    clock = Clock("products", "recurrence", "host")
    request = check_request(op, clock, *options)
    made = 0

    def note(products: int, runs: int) -> None:
        nonlocal made
        made = products
        if callback is not None:
            most, total = request.num_runs * request.num_steps, request.num_runs
            callback(DensityProgress(made, most, runs, total, clock.total()))

    blocks = lanczos_runs(op, request, clock, interrupted, note)
    coefficients = [pair for block in blocks for pair in block]
    with clock.part("host"):
        each = [gauss(*pair) for pair in coefficients]
        values = _summarize(op, request, each, times(width, exponent_of(op)))
    return SpectralDensity(
        **values,
        num_parameters=op.shape[0],
        num_steps=request.num_steps,
        num_deflated=request.deflation.count,
        num_matvecs=made + request.deflation.matvecs,
        block_size=request.block_size,
        seed=request.seed,
        seconds=clock.parts(),
        interrupted=bool(interrupted),
    )


def _summarize(
    op: Operator, request: Request, each: list[Quadrature], width: float | None
) -> dict[str, Any]:
    """The fields of the result that follow from the quadratures."""
    n, eps = op.shape[0], float(jnp.finfo(op.dtype).eps)
    atoms = request.atoms
    runs = np.full((3, len(each), request.num_steps), np.nan)
    for i, quadrature in enumerate(each):
        runs[:, i, : len(quadrature.nodes)] = quadrature
    nodes, weights, residuals = runs
    rest = n - len(atoms)  # the eigenvalues that the runs saw
    distinct = resolution.without_ghosts(each, rest, eps)
    places = np.append(nodes[~np.isnan(nodes)], atoms)
    largest = float(np.abs(places).max())
    narrowest = _NARROWEST * largest
    if width is not None and width < narrowest:
        unit = 0.5 ** exponent_of(op)
        warn(
            f"width={unit * width:.3g} is below what float64 resolves beside {unit * largest:.3g}; "
            f"{unit * narrowest:.3g} was applied"
        )
    width = max(narrowest, width or resolution.default_width(distinct, rest, eps))
    outliers = np.append(atoms, resolution.isolated(distinct, rest, eps))
    grid = resolution.density_grid(places, width)
    density, lower, upper = smoothed_density(grid, nodes, weights, atoms, n, width)
    return {
        "grid": grid,
        "density": density,
        "lower": lower,
        "upper": upper,
        "width": width,
        "nodes": nodes,
        "weights": weights,
        "residuals": residuals,
        "rounding": resolution.ROUNDING * eps * largest,
        "coupling": request.coupling,
        "atoms": atoms,
        "outliers": np.sort(outliers)[::-1],
    }
