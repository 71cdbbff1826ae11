"""What stochastic Lanczos quadrature returns."""

import dataclasses
import textwrap
from typing import Any, ClassVar

import numpy as np

from curvax.results.eigen import FloatArray
from curvax.results.smoothing import smoothed_cdf, smoothed_density
from curvax.results.stored import Stored

_MAX_OUTLIERS = 20

# Halvings of an interval: what is left is 2⁻⁶⁰ of it, or two neighbouring numbers.
_BISECTIONS = 60

# Nodes this small a part of the largest may be zero, in float32.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Stored):
    """The density of an operator's eigenvalues, by stochastic Lanczos quadrature.

    The measure estimated puts mass 1/n on each eigenvalue. Known eigenvalues (`deflate`) are atoms
    of it, exact; the rest is estimated from `p` random starts.

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

    def evaluate(self, x: Any) -> tuple[Any, Any, Any]:
        """The smoothed density at any points: `(density, lower, upper)`, as on `grid`.

        Args:
            x: points, of any shape.

        Returns:
            Three float64 of the shape of `x`, the last two a pointwise 95 % interval.
        """
        return smoothed_density(x, *self._measure())

    def cdf(self, x: Any) -> Any:
        """The mass of the smoothed measure at or below `x`: float64, of the shape of `x`."""
        return smoothed_cdf(x, *self._measure())[0]

    def cdf_interval(self, x: Any) -> tuple[Any, Any]:
        """The pointwise 95 % interval of `cdf(x)`: two float64 of the shape of `x`."""
        return smoothed_cdf(x, *self._measure())[1:]

    def quantile(self, q: Any) -> Any:
        """The least x with `cdf(x) ≥ q`: float64, of the shape of `q`.

        By bisection, to 2⁻⁶⁰ of the range of the spectrum, or the resolution of float64.

        Args:
            q: masses strictly between 0 and 1, of any shape.

        Raises:
            ValueError: a mass outside (0, 1).
        """
        masses = np.asarray(q, np.float64)
        if not np.all((masses > 0) & (masses < 1)):
            raise ValueError(f"q must lie strictly between 0 and 1, got {q}")
        places = np.append(self.nodes[~np.isnan(self.nodes)], self.atoms)
        # Below 40 widths from the last node the Gaussian's tail is zero in float64.
        low = np.full(masses.shape, places.min() - 40 * self.width)
        high = np.full(masses.shape, places.max() + 40 * self.width)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            enough = self.cdf(middle) >= masses
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high[()]

    def __str__(self) -> str:
        """Facts by line: size, runs, width, quantiles, the mass below zero, the outliers.

        Smoothing moves mass below zero, where the spectrum begins there; so the mass of the nodes
        below -1e-6 of the largest is given too.
        """
        at = [f"{100 * q:g} %: {self.quantile(q):.4g}" for q in (0.05, 0.5, 0.95)]
        low, high = self.cdf_interval(0.0)
        below = self._mass_of_negative_nodes()
        values = [f"{value:.6g}" for value in self.outliers[:_MAX_OUTLIERS]]
        if len(self.outliers) > _MAX_OUTLIERS:
            values.append(f"and {len(self.outliers) - _MAX_OUTLIERS} more")
        made = sorted({int(count) for count in np.sum(~np.isnan(self.nodes), axis=1)})
        steps = f"{made[0]}" if len(made) == 1 else f"{made[0]} to {made[-1]}"
        facts = {
            "parameters": f"{self.num_parameters:,}, eigenvalues deflated: {self.num_deflated}",
            "runs": f"{len(self.nodes)} of {steps} steps, {self.num_matvecs:,} products",
            "width": f"{self.width:.3g}",
            "quantiles": "    ".join(at),
            "below 0": f"{self.cdf(0.0):.4f} smoothed, 95 % in [{low:.4f}, {high:.4f}]; "
            f"of the nodes {below:.4f}",
            "outliers": ", ".join(values) or "none",
        }
        lines = [
            textwrap.fill(text, 80, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
            for name, text in facts.items()
        ]
        return "\n".join([*lines, "interrupted"] if self.interrupted else lines)

    def _mass_of_negative_nodes(self) -> float:
        """The mass of the nodes and atoms below zero, and not by rounding alone."""
        places = np.append(self.nodes, self.atoms)
        limit = -_ROUNDING * float(np.nanmax(np.abs(places)))
        rest = 1 - len(self.atoms) / self.num_parameters
        nodes = float(np.nansum(np.where(self.nodes < limit, self.weights, 0))) / len(self.nodes)
        return rest * nodes + float(np.sum(self.atoms < limit)) / self.num_parameters

    def _measure(self) -> tuple[FloatArray, FloatArray, FloatArray, int, float]:
        return self.nodes, self.weights, self.atoms, self.num_parameters, self.width
