"""What a linear solve returns."""

import dataclasses
from typing import Any, ClassVar

from curvax.results.stored import Stored


@dataclasses.dataclass(frozen=True, eq=False)
class SolveResult(Stored):
    """The solution of `(A + damping·I) x = b`.

    Attributes:
        x: the solution, of the structure of the operator's vectors.
        relative_residual: `‖b − (A + damping·I) x‖ / ‖b‖`, measured by a product of its own.
        converged: whether that is at most `tol`.
        tol: the tolerance asked for.
        damping: the damping.
        method: `"cg"` or `"minres"`.
        num_matvecs: vectors multiplied, with the one that measures the residual, and those that
            look for a reason where it is above `tol`.
        seconds: wall time, with compilation.
    """

    _large: ClassVar[tuple[str, ...]] = ("x",)

    x: Any = dataclasses.field(repr=False)
    relative_residual: float
    converged: bool
    tol: float
    damping: float
    method: str
    num_matvecs: int
    seconds: float

    def __str__(self) -> str:
        """One line."""
        mark = "converged" if self.converged else "NOT converged"
        return (
            f"{self.method}, damping {self.damping:g}: relative residual "
            f"{self.relative_residual:.2e},\n{mark} at {self.tol:g}, {self.num_matvecs} products"
        )
