"""What a solve returns: values with their certificates."""

import dataclasses
import sys
import warnings
from typing import Any, ClassVar, NamedTuple

import numpy as np

from curvax.results.encoding import record
from curvax.results.stored import Stored

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


class ConvergenceWarning(UserWarning):
    """Not every wanted pair converged, or the tolerance had to be raised."""


@record
class Matvecs(NamedTuple):
    """Vectors multiplied by the operator: in the solve, and to verify its result."""

    solve: int
    verification: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.solve + self.verification


@record
class Progress(NamedTuple):
    """The state of a solve after a block of products; what `callback` receives.

    `residual` is the worst estimated residual of a wanted pair, relative to the largest absolute
    Ritz value (infinite while there are fewer Ritz values than wanted ones); the solve ends when
    it falls to `tol`, or when `matvecs` reaches `max_matvecs`.
    """

    matvecs: int
    converged: int
    k: int
    residual: float
    tol: float
    max_matvecs: int
    restarts: int
    largest: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class EigenResult(Stored):
    """Eigenpairs of a symmetric operator, and what is proved of them.

    Attributes:
        eigenvalues: `(k,)` float64, descending; Rayleigh quotients of the returned vectors.
        eigenvectors: the structure of `params`, each leaf with a leading axis k; unit vectors of
            the flat space. None if they were not asked for.
        residuals: `(k,)` measured `‖A x − λ x‖₂`, from products made after the solve. NaN where
            the solve was interrupted before they could be made.
        bounds: `(k,)` an eigenvalue of the operator, as computed, lies within this distance of
            each value: the residual (Weyl). It does not say that none was missed: see `complete`.
        estimated_errors: `(k,)` `min(‖r‖, ‖r‖²/gap)` (Kato-Temple) with the gap to the nearest
            other Ritz value, so an estimate. After an interrupt, from the recurrence.
        converged: `(k,)` bool, `residuals ≤ tol_effective · |λ|max`, and no other Ritz value, far
            from converged, could still displace the pair from the wanted ones.
        complete: True, or False, if `certify="complete"` searched for missed eigenvalues and
            found none left, or ran out of products; None if nothing was searched.
        orthogonality: `max |XᵀX − I|` over the returned vectors, measured.
        noise: the largest error of the products that the solve saw, relative to |λ|max: the
            asymmetry of the projected operator, and the part of the measured residuals that the
            recurrence does not explain.
        tol_effective: the tolerance applied, relative to |λ|max: `tol`, or more where the noise
            of the products does not allow it.
        num_matvecs: vectors multiplied, in the solve and in the verification.
        num_restarts: thick restarts.
        block_size: vectors per product.
        seed: the seed of every random number of the solve.
        history: one `Progress` per block.
        seconds: wall time by part: `compile`, `products`, `orthogonalization`, `host`,
            `verification` and `total`.
        interrupted: whether Ctrl-C ended the solve.
        certified: whether the products were those of one fixed operator; False for a power
            iteration that draws another batch for each, whose residuals mean nothing.
    """

    _large: ClassVar[tuple[str, ...]] = ("eigenvectors",)

    eigenvalues: FloatArray
    eigenvectors: Any
    residuals: FloatArray
    bounds: FloatArray
    estimated_errors: FloatArray
    converged: BoolArray
    complete: bool | None
    orthogonality: float
    noise: float
    tol_effective: float
    num_matvecs: Matvecs
    num_restarts: int
    block_size: int
    seed: int
    history: tuple[Progress, ...] = dataclasses.field(repr=False)
    seconds: dict[str, float]
    interrupted: bool = False
    certified: bool = True

    @property
    def all_converged(self) -> bool:
        """Whether every pair converged."""
        return bool(np.all(self.converged))

    def __str__(self) -> str:
        """A table: value, residual, bound, estimated error, converged."""
        lines = [f"{'eigenvalue':>14} {'residual':>10} {'bound':>10} {'est. error':>10}  converged"]
        rows = zip(
            self.eigenvalues,
            self.residuals,
            self.bounds,
            self.estimated_errors,
            self.converged,
            strict=True,
        )
        for value, residual, bound, error, converged in rows:
            mark = "yes" if converged else "NO"
            lines.append(f"{value:14.6g} {residual:10.2e} {bound:10.2e} {error:10.2e}  {mark}")
        if not self.certified:
            lines.append("not certified: every product was that of another batch")
        return "\n".join(lines)


def warn(message: str, category: type[Warning] = ConvergenceWarning) -> None:
    """Issue a warning at the line that called curvax."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("curvax."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def warn_unconverged(converged: int, k: int, products: int, remedy: str) -> None:
    """Warn that only `converged` of `k` pairs converged after `products` products."""
    warn(f"{converged} of {k} pairs converged after {products} products: {remedy}")
