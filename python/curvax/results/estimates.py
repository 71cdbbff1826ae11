"""What the estimators of traces and diagonals, and the plain recurrence, return."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from curvax.filters import leaf_names
from curvax.results.encoding import record
from curvax.results.stored import Stored
from curvax.results.tables import aligned
from curvax.typing import FloatArray

# Leaves of a diagonal, and Ritz values at each end, that a table lists.
_MAX_LEAVES = 20
_MAX_EXTREME = 5


@record
class TraceProgress(NamedTuple):
    """The state of an estimate after a block of products; what `callback` receives.

    Attributes:
        matvecs: vectors multiplied so far.
        estimate: of all samples so far; NaN while there are too few.
        stderr: its standard error; NaN or infinite while there are too few.
        max_matvecs: the estimate ends when `matvecs` reaches it,
        until: or when `stderr` falls to this; None if that was not asked for.
        seconds: wall time so far.
    """

    matvecs: int
    estimate: float
    stderr: float
    max_matvecs: int
    until: float | None
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TraceResult(Stored):
    """A trace, or the log-determinant, with its error bar.

    Attributes:
        estimate: the estimate.
        stderr: its standard error.
        interval: `(low, high)`, which holds the truth with probability 0.95, roundings included;
            NaN where there are too few samples to say, infinite where there is no standard error.
        samples: `(s,)` float64, single estimates, of which the mean is the estimate (leave-one-out
            estimates for `"xtrace"` and `"xnystrace"`, whose correlation `stderr` allows for; for
            `"hutch++"` those of the part that the sketch leaves, which is added; none for
            `"exact"`). For `"hutchinson"`, `"hutch++"` and `"lanczos"` the products say more than
            the spread of these: `stderr` comes from them.
        method: `"hutchinson"`, `"hutch++"`, `"xtrace"`, `"xnystrace"`, `"exact"` or `"lanczos"`.
        distribution: of the probes: `"rademacher"`, `"gaussian"` or `"sphere"`; `"unit"` for
            `"exact"`.
        num_matvecs: vectors multiplied.
        num_deflated: eigenpairs whose part of the trace was taken as known.
        block_size: vectors per product.
        seed: the seed of every random number.
        history: one `TraceProgress` per block.
        seconds: wall time by part: `compile`, `products`, `host` and `total`; for `"lanczos"` also
            `recurrence`.
        interrupted: whether Ctrl-C ended it.
        no_interval: why the interval says nothing; empty where it does.
    """

    estimate: float
    stderr: float
    interval: tuple[float, float]
    samples: FloatArray
    method: str
    distribution: str
    num_matvecs: int
    num_deflated: int
    block_size: int
    seed: int
    history: tuple[TraceProgress, ...]
    seconds: dict[str, float]
    interrupted: bool = False
    no_interval: str = ""

    def __str__(self) -> str:
        """One row: estimate, standard error, 95 % interval, method, products, deflated pairs.

        Where there is no interval, a sentence below says why.
        """
        low, high = self.interval
        row = (
            f"{self.estimate:.6g}",
            f"{self.stderr:.2e}",
            "-" if np.isnan(low) else f"{low:.6g}",
            "-" if np.isnan(high) else f"{high:.6g}",
            self.method,
            str(self.num_matvecs),
            str(self.num_deflated),
        )
        header = ("estimate", "stderr", "95% low", "95% high", "method", "products", "deflated")
        notes = ["interrupted"] * self.interrupted
        notes += [f"no interval: {self.no_interval}"] * bool(self.no_interval)
        return "\n".join([aligned(header, [row]), *notes])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DiagonalResult(Stored):
    """The diagonal of an operator, with a standard error for every entry.

    Attributes:
        estimate: the structure of `params`; entry i estimates `A[i, i]`.
        stderr: the same structure: the standard error of each entry, 0 for `method="exact"`. NaN
            where there are too few samples to say, infinite where there is one.
        num_samples: independent samples behind each standard error: with Student's t of
            `num_samples − 1` degrees of freedom, `estimate ± t · stderr` is a 95 % interval.
        method: `"exact"`, `"hutchinson"` or `"xdiag"`.
        num_matvecs: vectors multiplied.
        block_size: vectors per product.
        seed: the seed of every random number; None for `method="exact"`.
        seconds: wall time by part: `compile`, `products`, `host` and `total`.
        interrupted: whether Ctrl-C ended it; entries not reached are then NaN.
        no_stderr: why `stderr` says nothing; empty where it does.
    """

    _large: ClassVar[tuple[str, ...]] = ("estimate", "stderr")

    estimate: Any
    stderr: Any
    num_samples: int
    method: str
    num_matvecs: int
    block_size: int
    seed: int | None
    seconds: dict[str, float]
    interrupted: bool = False
    no_stderr: str = ""

    def leaves(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """By name, the flat entries of each leaf that were reached, and their standard errors."""
        names = leaf_names(self.estimate)
        pairs = zip(jax.tree.leaves(self.estimate), jax.tree.leaves(self.stderr), strict=True)
        return {name or "(array)": _reached(*pair) for name, pair in zip(names, pairs, strict=True)}

    def __str__(self) -> str:
        """A row per leaf, of at most 20, and one for all: size, sum, mean, ends, median stderr.

        Entries that were not reached (NaN) are left out, and counted below the table.
        """
        leaves = self.leaves()
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(self.estimate)]
        reached = [values for values, _ in leaves.values()]
        rows: list[tuple[str, ...]] = [
            (name, f"{size:,}", *summary([values]), f"{_median(errors):.3g}")
            for (name, (values, errors)), size in zip(leaves.items(), sizes, strict=True)
        ]
        if len(rows) > _MAX_LEAVES:
            rows[_MAX_LEAVES:] = [(f"and {len(rows) - _MAX_LEAVES} more", *[""] * 6)]
        rows.append(("total", f"{sum(sizes):,}", *summary(reached), ""))
        header = ("leaf", "size", "sum", "mean", "min", "max", "stderr")
        missing = sum(sizes) - sum(len(values) for values in reached)
        notes = [f"no standard errors: {self.no_stderr}"] * bool(self.no_stderr)
        if self.interrupted:
            left = f": {missing:,} entries not reached" if missing else ""
            notes.append(f"interrupted after {self.num_matvecs:,} products{left}")
        return "\n".join([aligned(header, rows, named=True), *notes])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LanczosTridiagonal(Stored):
    """The plain Lanczos recurrence: `A Qᵀ = Qᵀ T + last_beta q eᵀ`, with T tridiagonal.

    Attributes:
        alphas: `(m,)` float64, the diagonal of T.
        betas: `(m − 1,)` float64, beside the diagonal.
        last_beta: the coupling to the vector after the last; 0 if the space is invariant.
        basis: `(m, n)` rows q, if they were asked for, else None.
        num_matvecs: m.
        seed: of the start, None if it was given.
        seconds: wall time by part: `compile`, `products`, `recurrence`, `host` and `total`.
        interrupted: whether Ctrl-C ended it.
    """

    _large: ClassVar[tuple[str, ...]] = ("basis",)

    alphas: FloatArray
    betas: FloatArray
    last_beta: float
    basis: Any
    num_matvecs: int
    seed: int | None
    seconds: dict[str, float]
    interrupted: bool = False

    def ritz(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Ritz values `(m,)` descending, their weights, and their residuals.

        With T = S diag(θ) Sᵀ, the weights are `S[0]²`, of sum 1 (Gauss quadrature, G. Golub and
        J. Welsch, Math. Comp. 23, 1969), and the residuals `last_beta · |S[-1]|`: an eigenvalue of
        the operator lies within that distance of each Ritz value, as far as the rows of `basis`
        are orthogonal.
        """
        tridiagonal = np.diag(self.alphas) + np.diag(self.betas, 1) + np.diag(self.betas, -1)
        values, vectors = np.linalg.eigh(tridiagonal)
        residuals = np.abs(self.last_beta * vectors[-1])
        return values[::-1], vectors[0, ::-1] ** 2, residuals[::-1]

    def __str__(self) -> str:
        """The five highest and five lowest Ritz values with their residuals and weights."""
        rows = [
            (f"{value:.6g}", f"{residual:.2e}", f"{weight:.2e}")
            for value, weight, residual in zip(*self.ritz(), strict=True)
        ]
        if len(rows) > 2 * _MAX_EXTREME:
            rows[_MAX_EXTREME:-_MAX_EXTREME] = [("...", "", "")]
        steps = f"steps {len(self.alphas)}, last beta {self.last_beta:.3g}"
        table = aligned(("Ritz value", "residual", "weight"), rows)
        return "\n".join([steps, table, *["interrupted"] * self.interrupted])


def summary(leaves: Sequence[FloatArray]) -> tuple[str, str, str, str]:
    """Cells for the sum, mean, least and largest of all entries; NaN where there are none."""
    filled = [leaf for leaf in leaves if leaf.size]
    size = sum(leaf.size for leaf in filled)
    total = sum(float(np.sum(leaf, dtype=np.float64)) for leaf in filled)
    mean = total / size if size else np.nan
    low = min((float(leaf.min()) for leaf in filled), default=np.nan)
    high = max((float(leaf.max()) for leaf in filled), default=np.nan)
    return (f"{total:.4g}", f"{mean:.3g}", f"{low:.3g}", f"{high:.3g}")


def _reached(estimate: Any, stderr: Any) -> tuple[FloatArray, FloatArray]:
    values, errors = np.ravel(np.asarray(estimate)), np.ravel(np.asarray(stderr))
    missing = np.isnan(values)
    # The copy is made only where it is needed: leaves can be as long as 1e8.
    return (values[~missing], errors[~missing]) if missing.any() else (values, errors)


def _median(errors: FloatArray) -> float:
    return float(np.median(errors)) if errors.size else np.nan
