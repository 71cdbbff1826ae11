"""What stochastic Lanczos quadrature returns."""

import dataclasses
import functools
import textwrap
from typing import Any, ClassVar, NamedTuple

import numpy as np

from curvax.results.distribution import (
    FAR,
    Cells,
    MeanRule,
    cells,
    displacement,
    fraction_interval,
    mass_bounds,
    mean_rule,
)
from curvax.results.smoothing import smoothed_density
from curvax.results.stored import Stored
from curvax.typing import FloatArray

_MAX_OUTLIERS = 20

# A quantile is found to this part of the rounding of the eigenvalues, or of the largest.
_TENTH, _FINEST = 0.1, 1e-15


class DensityProgress(NamedTuple):
    """The state of `spectral_density` after a step of a block of runs; what `callback` receives.

    Attributes:
        matvecs: vectors multiplied so far.
        max_matvecs: vectors multiplied at the end, unless runs break down before.
        runs: complete runs.
        num_runs: runs at the end.
        seconds: wall time so far.
    """

    matvecs: int
    max_matvecs: int
    runs: int
    num_runs: int
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Stored):
    """The density of an operator's eigenvalues, by stochastic Lanczos quadrature.

    The measure estimated puts mass 1/n on each eigenvalue. Known eigenvalues (`deflate`) are atoms
    of it, as exact as their residuals; the rest is estimated from `p` random starts.

    `density` and `evaluate` speak of the measure smoothed by a Gaussian; `cdf`, `cdf_interval`,
    `quantile` and `quantile_interval` of the eigenvalues themselves, unsmoothed.

    Attributes:
        grid: `(g,)` ascending, finer near the nodes; the trapezoidal rule over it is accurate.
        density: `(g,)` of the measure smoothed by a Gaussian of standard deviation `width`; it
            integrates to 1.
        lower: `(g,)` lower end of the pointwise 95 % interval of that smoothed density, from the
            distribution of the random starts; `results/smoothing.py` derives it.
        upper: `(g,)` its upper end.
        width: standard deviation of the Gaussian, in units of the eigenvalues: a stated choice.
        nodes: `(p, m)` Ritz values of every run, ascending; NaN beyond the end of a run that broke
            down in an invariant subspace.
        weights: `(p, m)` their weights; of a run they sum to 1 (NaN where the nodes are).
        residuals: `(p, m)` their residuals: an eigenvalue lies within this distance of each node
            (NaN where the nodes are). None in results of versions that kept none.
        rounding: within this distance of a point an eigenvalue counts as on either side: ten
            roundoffs of the largest.
        coupling: `‖A X − X Θ‖` of the pairs left out, by which the atoms, and a little what the
            runs see, may differ from eigenvalues.
        atoms: `(num_deflated,)` the known eigenvalues.
        outliers: `(k,)` eigenvalues outside the bulk, descending: the atoms, and Ritz values on
            which the runs agree.
        num_parameters: n.
        num_steps: m.
        num_deflated: eigenvalues taken as known.
        num_matvecs: vectors multiplied.
        block_size: runs that go side by side.
        seed: the seed of every random number.
        seconds: wall time by part: `compile`, `products`, `recurrence`, `host` and `total`.
        interrupted: whether Ctrl-C ended it.
    """

    _large: ClassVar[tuple[str, ...]] = ("grid", "density", "lower", "upper")

    grid: FloatArray
    density: FloatArray
    lower: FloatArray
    upper: FloatArray
    width: float
    nodes: FloatArray
    weights: FloatArray
    atoms: FloatArray
    outliers: FloatArray
    num_parameters: int
    num_steps: int
    num_deflated: int
    num_matvecs: int
    block_size: int
    seed: int
    seconds: dict[str, float]
    interrupted: bool = False
    residuals: FloatArray | None = dataclasses.field(default=None, repr=False)
    rounding: float = 0.0
    coupling: float = 0.0

    def evaluate(self, x: Any) -> tuple[Any, Any, Any]:
        """The smoothed density at any points: `(density, lower, upper)`, as on `grid`.

        Args:
            x: points, of any shape.

        Returns:
            Three float64 of the shape of `x`, the last two a pointwise 95 % interval.
        """
        n = self.num_parameters
        return smoothed_density(x, self.nodes, self.weights, self.atoms, n, self.width)

    def cdf(self, x: Any) -> Any:
        """The fraction of the operator's eigenvalues at or below `x`: float64, of the shape of `x`.

        By the nodes, the mass of each spread over what it stands for, within what the quadratures
        allow; an eigenvalue within `rounding` of `x` counts as at it.

        Raises:
            ValueError: `x` has NaN, or the result is of a version that kept no residuals.
        """
        return self._fractions(x)[1]

    def cdf_interval(self, x: Any) -> tuple[Any, Any]:
        """The pointwise 95 % interval of the fraction of the eigenvalues at or below `x`.

        It holds both the randomness of the starts and the greatest error that the quadrature can
        have, as `results/distribution.py` derives it; so where a single node carries much mass, it
        is wide, however many runs there are: more steps narrow it. An eigenvalue within `rounding`
        of `x` may be on either side.

        Returns:
            Two float64 of the shape of `x`.

        Raises:
            ValueError: `x` has NaN, or the result is of a version that kept no residuals.
        """
        low, _, high = self._fractions(x)
        return low, high

    def quantile(self, q: Any) -> Any:
        """The least x with `cdf(x) ≥ q`, to rounding: float64, of the shape of `q`.

        By bisection, to a tenth of `rounding`.

        Args:
            q: fractions strictly between 0 and 1, of any shape.

        Raises:
            ValueError: a fraction outside (0, 1), or the result is of a version that kept no
                residuals.
        """
        # That eigenvalue counts from `rounding` below it on.
        return self._least(q, 1) + self.rounding

    def quantile_interval(self, q: Any) -> tuple[Any, Any]:
        """The 95 % interval of the least x at or below which a fraction `q` of the eigenvalues is.

        An end that the quadrature does not bound within 1000 times the largest node is infinite.

        Args:
            q: fractions strictly between 0 and 1, of any shape.

        Returns:
            Two float64 of the shape of `q`.

        Raises:
            ValueError: as `quantile` does.
        """
        return self._least(q, 2), self._least(q, 0)

    def __str__(self) -> str:
        """Facts by line: size, runs, width, quantiles, the fraction below zero, the outliers.

        Below zero is what is so by more than rounding.
        """
        values = [f"{value:.6g}" for value in self.outliers[:_MAX_OUTLIERS]]
        if len(self.outliers) > _MAX_OUTLIERS:
            values.append(f"and {len(self.outliers) - _MAX_OUTLIERS} more")
        made = sorted({int(count) for count in np.sum(~np.isnan(self.nodes), axis=1)})
        steps = f"{made[0]}" if len(made) == 1 else f"{made[0]} to {made[-1]}"
        facts = {
            "parameters": f"{self.num_parameters:,}, eigenvalues deflated: {self.num_deflated}",
            "runs": f"{len(self.nodes)} of {steps} steps, {self.num_matvecs:,} products",
            "width": f"{self.width:.3g}",
            **(self._lines() if self.residuals is not None else {}),
            "outliers": ", ".join(values) or "none",
        }
        lines = [
            textwrap.fill(text, 80, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
            for name, text in facts.items()
        ]
        return "\n".join([*lines, "interrupted"] if self.interrupted else lines)

    def _lines(self) -> dict[str, str]:
        """Lines of the table: three quantiles, and the fraction below zero."""
        parts = np.array([0.05, 0.5, 0.95])
        rows = zip(parts, self.quantile(parts), *self.quantile_interval(parts), strict=True)
        facts = {
            f"{100 * q:g} % below": f"{middle:.4g}, 95 % in [{low:.4g}, {high:.4g}]"
            for q, middle, low, high in rows
        }
        # Zeros are seen no further than half of this from zero.
        zero = -2 * float(self._reach(np.zeros(1))[0])
        low, middle, high = self._fractions(zero)
        facts["below 0"] = f"{middle:.4f}, 95 % in [{low:.4f}, {high:.4f}]" + (
            f" (below {zero:.2g}, beyond rounding)" if zero else ""
        )
        return facts

    @property
    def _unknown(self) -> int:
        return self.num_parameters - len(self.atoms)

    @functools.cached_property
    def _measure(self) -> tuple[MeanRule, Cells]:
        if self.residuals is None:
            raise ValueError(
                "the result is of a version that kept no residuals, without which nothing is known "
                "of the quadrature's error: compute it again with spectral_density"
            )
        runs = self.nodes, self.weights, self.residuals
        return mean_rule(*runs), cells(*runs)

    def _reach(self, x: FloatArray) -> FloatArray:
        """How far from `x` the runs may see an eigenvalue that is there."""
        return self.rounding + displacement(x, self.atoms, self.coupling)

    def _fractions(self, x: Any) -> tuple[Any, Any, Any]:
        """The fraction at or below `x`: lower end, estimate and upper end, of the shape of `x`."""
        points = np.asarray(x, np.float64)
        if np.isnan(points).any():
            raise ValueError(f"x must hold numbers, got {x}")
        flat = points.ravel()
        atoms = np.sort(self.atoms)
        shift = self.rounding + 2 * self.coupling
        few, many = (np.searchsorted(atoms, flat + s, "right") for s in (-shift, shift))
        least, middle, greatest = self._masses(flat)
        if self._unknown:
            runs = int(np.sum(~np.isnan(self.nodes).all(axis=1)))
            least, greatest = fraction_interval(least, greatest, self._unknown, runs)
        # Whole numbers of eigenvalues, so that a count divided by n compares equal.
        low = (few + np.rint(least * self._unknown)) / self.num_parameters
        high = (many + np.rint(greatest * self._unknown)) / self.num_parameters
        estimate = np.clip((many + middle * self._unknown) / self.num_parameters, low, high)
        low, estimate, high = (value.reshape(points.shape)[()] for value in (low, estimate, high))
        return low, estimate, high

    def _masses(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The mass at or below `x`: the least that the runs allow, an estimate and the greatest."""
        if not self._unknown:
            return np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        rule, spread = self._measure
        reach = self._reach(x)
        least, _ = mass_bounds(rule, x - reach)
        lower, greatest = mass_bounds(rule, x + reach)
        return least, np.clip(spread.below(x + reach), lower, greatest), greatest

    def _least(self, q: Any, which: int) -> Any:
        """The least x at which one of `_fractions`, which rise, is at least `q`."""
        given = np.asarray(q, np.float64)
        if not np.all((given > 0) & (given < 1)):
            raise ValueError(f"q must lie strictly between 0 and 1, got {q}")
        masses = given.ravel()
        places = np.append(self.nodes[~np.isnan(self.nodes)], self.atoms)
        largest = float(np.abs(places).max()) or 1.0
        low, high = np.full(masses.shape, -FAR * largest), np.full(masses.shape, FAR * largest)
        unbounded = (
            self._fractions(low)[which] >= masses,
            self._fractions(high)[which] < masses,
        )
        tolerance = max(_TENTH * self.rounding, _FINEST * largest)
        for _ in range(int(np.ceil(np.log2(2 * FAR * largest / tolerance)))):
            middle = 0.5 * (low + high)
            enough = self._fractions(middle)[which] >= masses
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        high = np.where(unbounded[0], -np.inf, np.where(unbounded[1], np.inf, high))
        return high.reshape(given.shape)[()]
