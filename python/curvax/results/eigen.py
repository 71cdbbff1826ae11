"""What a solve returns: values with their certificates."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from curvax.program import Clock
from curvax.results.encoding import record
from curvax.results.stored import Stored
from curvax.results.tables import aligned, measured, place, verdict
from curvax.typing import BoolArray, FloatArray, IntArray


@record
class Progress(NamedTuple):
    """The state of a solve after a block of products; what `callback` receives.

    Attributes:
        matvecs: vectors multiplied so far, without verification.
        converged: wanted pairs whose estimated residual is within what is allowed of it.
        k: wanted pairs.
        residual: the worst estimated residual of a wanted pair, relative to the largest absolute
            Ritz value; infinite while there are fewer Ritz values than wanted ones.
        tol: the solve ends when `residual` falls to it,
        max_matvecs: or when `matvecs` reaches this.
        restarts: thick restarts so far.
        largest: the largest absolute Ritz value.
        seconds: wall time so far.
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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EigenResult(Stored):
    """Eigenpairs of a symmetric operator, and what is proved of them.

    Attributes:
        eigenvalues: `(k,)` float64, descending; Rayleigh quotients of the returned vectors.
        eigenvectors: the structure of `params`, each leaf with a leading axis k; unit vectors of
            the flat space. None if they were not asked for.
        residuals: `(k,)` measured `‖A x − λ x‖₂`, from products made after the solve. NaN where
            the solve was interrupted before they could be made.
        estimated_errors: `(k,)` `min(‖r‖, ‖r‖²/gap)` (Kato-Temple) with the gap to the nearest
            other Ritz value, so an estimate. After an interrupt, from the recurrence.
        converged: `(k,)` bool, `residuals ≤ tol_effective · |λ|max`, and no other Ritz value, moved
            by its residual, could still displace the pair from the wanted ones.
        complete: True, or False, if `certify="complete"` searched for missed eigenvalues and
            found none left, or ran out of products; None if nothing was searched.
        orthogonality: `max |XᵀX − I|` over the returned vectors, measured.
        noise: the largest error of the products that the solve saw, relative to |λ|max: the
            asymmetry of the projected operator, and the part of the measured residuals that the
            recurrence does not explain.
        tol_effective: `(k,)` the residual allowed of each pair, in units of |λ|max: `tol` times
            what it is relative to (`relative_to` of `eigsh`), or more where the noise of the
            products does not allow it.
        num_matvecs: vectors multiplied in the solve.
        num_verification: vectors multiplied after it, to measure the residuals.
        num_restarts: thick restarts.
        block_size: vectors per product.
        seed: the seed of every random number of the solve.
        history: one `Progress` per block.
        seconds: wall time by part: `compile`, `products`, `orthogonalization`, `host`,
            `verification` and `total`. A step waits for its products and their orthogonalisation
            at once; their parts are told apart by the products of the verification.
        interrupted: whether Ctrl-C ended the solve.
        certified: whether the products were those of one fixed operator; False for a power
            iteration that draws another batch for each, whose residuals mean nothing.
        indices: `(k,)` the place of each value in the spectrum, as far as it is known: 1, 2, …
            from the highest down, and −1, −2, … from the lowest up. Where they were chosen by
            magnitude, negative values are counted from the low end. 0 where an interrupt came
            before there were k. From the signs, if left out.
    """

    _large: ClassVar[tuple[str, ...]] = ("eigenvectors",)

    eigenvalues: FloatArray
    eigenvectors: Any
    residuals: FloatArray
    estimated_errors: FloatArray
    converged: BoolArray
    complete: bool | None
    orthogonality: float
    noise: float
    tol_effective: FloatArray
    num_matvecs: int
    num_verification: int
    num_restarts: int
    block_size: int
    seed: int
    history: tuple[Progress, ...]
    seconds: dict[str, float]
    interrupted: bool = False
    certified: bool = True
    indices: IntArray = None  # type: ignore[assignment]  # never None once made

    def __post_init__(self) -> None:
        """Number the values by their signs, where nothing else is known."""
        if self.indices is None:
            found = numbered(len(self.eigenvalues), int(np.sum(self.eigenvalues < 0)))
            object.__setattr__(self, "indices", found)

    @classmethod
    def measured(
        cls,
        values: Any,
        residuals: Any,
        vectors: Callable[[IntArray], Any],
        *,
        clock: Clock,
        history: Sequence[Progress],
        estimated_errors: Any,
        converged: Any,
        tol_effective: Any,
        **facts: Any,
    ) -> Self:
        """The result of a solve, whose pairs may come in any order.

        Args:
            values: `(k,)`.
            residuals: `(k,)`.
            vectors: called once, with the indices that sort the values; returns `eigenvectors`.
            clock: of the solve, read at the end.
            history: of the solve so far.
            estimated_errors: `(k,)`.
            converged: `(k,)` bool.
            tol_effective: `(k,)`.
            facts: the other fields, which have no order.
        """
        down = np.argsort(-np.asarray(values), kind="stable")
        return cls(
            eigenvalues=np.asarray(values)[down],
            eigenvectors=vectors(down),
            residuals=np.asarray(residuals)[down],
            estimated_errors=np.asarray(estimated_errors)[down],
            converged=np.asarray(converged)[down],
            tol_effective=np.asarray(tol_effective)[down],
            history=tuple(history),
            seconds=clock.parts(),
            **facts,
        )

    @property
    def bounds(self) -> FloatArray:
        """`(k,)` an eigenvalue of the operator, as computed, lies within this distance of each.

        That is the residual (Weyl). It does not say that none was missed: see `complete`.
        """
        return self.residuals

    @property
    def all_converged(self) -> bool:
        """Whether every pair converged."""
        return bool(np.all(self.converged))

    @property
    def relative_bounds(self) -> FloatArray:
        """`(k,)` bounds divided by |value|; where that is 1 or more, the value may be zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.bounds / np.abs(self.eigenvalues)
        return np.where(self.bounds == 0, 0.0, ratio)

    def __str__(self) -> str:
        """A table: index, value, residual, bound (absolute, relative), est. error, converged.

        After an interrupt a value whose residual was not measured is an estimate, "not verified".
        """
        header = (
            "index", "eigenvalue", "residual", "bound", "rel. bound", "est. error", "converged"
        )  # fmt: skip
        rows = [
            (
                place(index),
                f"{value:.6g}",
                *(measured(number) for number in numbers),
                verdict(numbers[0], converged, ("yes", "NO")),
            )
            for index, value, *numbers, converged in zip(
                self.indices,
                self.eigenvalues,
                self.residuals,
                self.bounds,
                self.relative_bounds,
                self.estimated_errors,
                self.converged,
                strict=True,
            )
        ]
        notes = []
        if not self.certified:
            notes.append("not certified: every product was that of another batch")
        if self.interrupted:
            notes.append("interrupted: what is not verified is an estimate")
        return "\n".join([aligned(header, rows), *notes])


def numbered(count: int, low: int) -> IntArray:
    """Places of `count` values in descending order, the last `low` counted from the low end."""
    return np.append(np.arange(1, count - low + 1), np.arange(-low, 0))
