"""What a linear solve returns."""

import dataclasses
from typing import Any, ClassVar

from curvax.results.stored import Stored


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SolveResult(Stored):
    """The solution of `(A + damping·I) x = b`.

    Attributes:
        x: the solution, of the structure of the operator's vectors.
        relative_residual: `‖b − (A + damping·I) x‖ / ‖b‖`, measured by a product of its own.
        converged: whether that is at most `tol`.
        tol: the tolerance asked for.
        damping: the damping.
        method: `"cg"` or `"minres"`.
        num_matvecs: vectors multiplied in the iteration.
        num_verification: vectors multiplied after it: the one that measures the residual and, where
            that is above `tol`, those that look for a reason.
        seconds: wall time by part: `compile`, `products`, `host`, `verification` and `total`.
        interrupted: whether Ctrl-C ended it.
    """

    _large: ClassVar[tuple[str, ...]] = ("x",)

    x: Any
    relative_residual: float
    converged: bool
    tol: float
    damping: float
    method: str
    num_matvecs: int
    num_verification: int
    seconds: dict[str, float]
    interrupted: bool = False

    def __str__(self) -> str:
        """Two sentences: whether the method solved the system, and the residual."""
        system = f"(A + {self.damping:.3g} I) x = b" if self.damping else "A x = b"
        done, where = ("solved", "within") if self.converged else ("did not solve", "above")
        first = "Interrupted: " if self.interrupted else ""
        return (
            f"{first}{self.method.upper()} {done} {system} with {self.num_matvecs:,} products, and "
            f"{self.num_verification:,} to verify.\n"
            f"The measured relative residual is {self.relative_residual:.2e}, {where} the "
            f"tolerance of {self.tol:.3g}."
        )
