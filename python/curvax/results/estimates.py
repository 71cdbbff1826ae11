"""What the stochastic estimators return: values with 95 % intervals."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from curvax.results.stored import Stored

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


class TraceProgress(NamedTuple):
    """The state of an estimate after a block of products; what `callback` receives."""

    matvecs: int
    estimate: float
    stderr: float
    max_matvecs: int
    until: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class TraceResult(Stored):
    """A trace, or the log-determinant, with its error bar.

    Attributes:
        estimate: the estimate.
        stderr: its standard error.
        interval: `(low, high)`, which holds the truth with probability 0.95: Student's t where the
            error is estimated from few samples.
        samples: `(s,)` float64, the single estimates whose spread gives `stderr` (leave-one-out
            estimates for `"xtrace"` and `"xnystrace"`, of which the mean is the estimate; for
            `"hutch++"` those of the part that the sketch leaves).
        method: `"hutchinson"`, `"hutch++"`, `"xtrace"`, `"xnystrace"` or `"lanczos"`.
        distribution: of the probes: `"rademacher"`, `"gaussian"` or `"sphere"`.
        num_matvecs: vectors multiplied.
        num_deflated: eigenpairs whose part of the trace was taken as known.
        block_size: vectors per product.
        seed: the seed of every random number.
        history: one `TraceProgress` per block.
        seconds: wall time by part: `compile`, `products`, `host` and `total`.
        interrupted: whether Ctrl-C ended it.
    """

    estimate: float
    stderr: float
    interval: tuple[float, float]
    samples: FloatArray = dataclasses.field(repr=False)
    method: str
    distribution: str
    num_matvecs: int
    num_deflated: int
    block_size: int
    seed: int
    history: tuple[TraceProgress, ...] = dataclasses.field(repr=False)
    seconds: dict[str, float] = dataclasses.field(repr=False)
    interrupted: bool = False


@dataclasses.dataclass(frozen=True)
class DiagonalResult(Stored):
    """The diagonal of an operator, with a standard error for every entry.

    Attributes:
        estimate: the structure of `params`; entry i estimates `A[i, i]`.
        stderr: the same structure: the standard error of each entry, 0 for `method="exact"`.
        num_samples: independent samples behind each standard error: with Student's t of
            `num_samples − 1` degrees of freedom, `estimate ± t · stderr` is a 95 % interval.
        method: `"exact"`, `"hutchinson"` or `"xdiag"`.
        num_matvecs: vectors multiplied.
        block_size: vectors per product.
        seed: the seed of every random number; None for `method="exact"`.
        seconds: wall time by part: `compile`, `products`, `host` and `total`.
        interrupted: whether Ctrl-C ended it; entries not reached are then NaN.
    """

    estimate: Any
    stderr: Any
    num_samples: int
    method: str
    num_matvecs: int
    block_size: int
    seed: int | None
    seconds: dict[str, float] = dataclasses.field(repr=False)
    interrupted: bool = False


@dataclasses.dataclass(frozen=True)
class SpectralDensity(Stored):
    """The density of an operator's eigenvalues, by stochastic Lanczos quadrature.

    The measure estimated puts mass 1/n on each eigenvalue. Known eigenvalues (`deflate`) are atoms
    of it, exact; the rest is estimated from `p` random starts.

    Attributes:
        grid: `(g,)` ascending, finer near the nodes; the trapezoidal rule over it is accurate.
        density: `(g,)` of the measure smoothed by a Gaussian of standard deviation `width`; it
            integrates to 1.
        lower: `(g,)` lower end of the pointwise 95 % interval of that smoothed density.
        upper: `(g,)` its upper end.
        width: standard deviation of the Gaussian, in units of the eigenvalues: a stated choice.
        nodes: `(p, m)` Ritz values of every run, ascending; NaN beyond the end of a run that broke
            down in an invariant subspace.
        weights: `(p, m)` their weights; of a run they sum to 1 (NaN where the nodes are).
        outliers: `(k,)` eigenvalues outside the bulk, descending: the atoms, and Ritz values on
            which the runs agree.
        num_parameters: n.
        num_steps: m.
        num_deflated: eigenvalues taken as known.
        num_matvecs: vectors multiplied.
        block_size: runs that go side by side.
        seed: the seed of every random number.
        seconds: wall time by part: `compile`, `products`, `host` and `total`.
        interrupted: whether Ctrl-C ended it.
    """

    grid: FloatArray = dataclasses.field(repr=False)
    density: FloatArray = dataclasses.field(repr=False)
    lower: FloatArray = dataclasses.field(repr=False)
    upper: FloatArray = dataclasses.field(repr=False)
    width: float
    nodes: FloatArray = dataclasses.field(repr=False)
    weights: FloatArray = dataclasses.field(repr=False)
    atoms: FloatArray = dataclasses.field(repr=False)
    outliers: FloatArray
    num_parameters: int
    num_steps: int
    num_deflated: int
    num_matvecs: int
    block_size: int
    seed: int
    seconds: dict[str, float] = dataclasses.field(repr=False)
    interrupted: bool = False


@dataclasses.dataclass(frozen=True)
class LanczosTridiagonal(Stored):
    """The plain Lanczos recurrence: `A Qᵀ = Qᵀ T + last_beta q eᵀ`, with T tridiagonal.

    Attributes:
        alphas: `(m,)` float64, the diagonal of T.
        betas: `(m − 1,)` float64, beside the diagonal.
        last_beta: the coupling to the vector after the last; 0 if the space is invariant.
        basis: `(m, n)` rows q, if they were asked for, else None.
        num_matvecs: m.
        seed: of the start, None if it was given.
    """

    alphas: FloatArray
    betas: FloatArray
    last_beta: float
    basis: Any = dataclasses.field(repr=False)
    num_matvecs: int
    seed: int | None
