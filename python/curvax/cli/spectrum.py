"""`curvax spectrum`, and `curvax demo`, which is one of the shipped GPT."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvax.cli.display import show_progress
from curvax.cli.exits import Status
from curvax.cli.options import (
    Certify,
    Count,
    Limit,
    MaxMatvecs,
    RelativeTo,
    Seed,
    Tol,
    Which,
)
from curvax.cli.problem import Problem
from curvax.cli.report import print_result
from curvax.cli.session import Session, command
from curvax.warnings import ConvergenceWarning

if TYPE_CHECKING:
    from curvax.results import EigenResult


@dataclasses.dataclass(frozen=True)
class SpectrumOptions:
    """The eigenvalues that are asked for, and what they may cost.

    Attributes:
        k: how many, or how many from the high and from the low end.
        which: see `eigsh`.
        tol: see `eigsh`.
        certify: see `eigsh`.
        relative_to: see `eigsh`.
        max_matvecs: see `eigsh`.
        seed: see `eigsh`.
        limit: bytes that the solve may add.
        remedy: what lowers the memory.
    """

    k: int | tuple[int, int]
    which: Which
    tol: float
    certify: Certify
    relative_to: RelativeTo = None
    max_matvecs: int | None = None
    seed: int = 0
    limit: int | None = None
    remedy: str = "raise --limit or lower -k"

    def __post_init__(self) -> None:
        if self.max_matvecs is not None and self.max_matvecs < self.total:
            raise typer.BadParameter(
                f"{self.total} eigenvalues need at least as many products, got {self.max_matvecs}; "
                "raise it or ask for fewer",
                param_hint="--max-matvecs",
            )

    @property
    def total(self) -> int:
        """How many in all."""
        return self.k if isinstance(self.k, int) else sum(self.k)

    def __str__(self) -> str:
        if isinstance(self.k, int):
            return f"{self.k} eigenvalues ({self.which}), tol {self.tol:g}"
        return f"{self.k[0]} highest and {self.k[1]} lowest eigenvalues, tol {self.tol:g}"


@command()
def spectrum(
    session: Session,
    count: Count = 5,
    which: Which = "LM",
    tol: Tol = 1e-3,
    relative_to: RelativeTo = None,
    limit: Limit = None,
    max_matvecs: MaxMatvecs = None,
    seed: Seed = 0,
    certify: Certify = "residuals",
) -> Status:
    """Find outermost eigenvalues of a problem, each with its residual.

    Forecasts the memory first, and chooses the size and the storage of the basis to fit. Writes
    spectrum.npz, .json, .txt and .png, and config.json with all options, into DIR. The exit status
    is 0 if every eigenpair converged, 3 if not, 2 for bad input (also if the solve would not fit)
    and 130 after Ctrl-C, which keeps what the solve knows.
    """
    wanted = SpectrumOptions(count, which, tol, certify, relative_to, max_matvecs, seed, limit)
    return analyse(session, wanted)


@command(Problem("curvax.models.gpt:make_problem"))
def demo(
    session: Session,
    high: Annotated[
        int, typer.Option(min=0, metavar="N", help="Eigenvalues from the high end.")
    ] = 10,
    low: Annotated[int, typer.Option(min=0, metavar="N", help="Eigenvalues from the low end.")] = 5,
    tol: Tol = 1e-3,
    max_matvecs: MaxMatvecs = None,
    seed: Seed = 0,
    certify: Certify = "residuals",
) -> Status:
    """Find outermost eigenvalues of a small GPT that ships with it.

    The same as `curvax spectrum curvax.models.gpt:make_problem --which BE`, with a number for each
    end. The exit status is 0 if every eigenpair converged, 3 if not, 2 for bad input and 130 after
    Ctrl-C, which keeps what the solve knows.
    """
    if not high + low:
        raise typer.BadParameter("ask for at least one eigenvalue", param_hint="--high, --low")
    remedy = "lower --high, --low"
    wanted = SpectrumOptions(
        (high, low), "BE", tol, certify, None, max_matvecs, seed, remedy=remedy
    )
    return analyse(session, wanted)


def analyse(session: Session, wanted: SpectrumOptions) -> Status:
    """Find, print and write the eigenvalues wanted."""
    op = session.load(wanted=str(wanted))
    result = _solve(session, op, wanted)

    def show() -> None:
        print_result(session.console, result, wanted.total)

    title = f"{session.problem.matrix} of {session.problem.target}: outermost eigenvalues"
    return session.finish(op, result, "spectrum", title, show, result.all_converged)


def _solve(session: Session, op: Any, wanted: SpectrumOptions) -> EigenResult:
    import curvax as cx

    options: dict[str, Any] = {
        "which": wanted.which,
        "tol": wanted.tol,
        "certify": wanted.certify,
    }
    with show_progress(session.quiet, "compiling the matrix-vector product"):
        plan = cx.plan(op, wanted.k, limit=wanted.limit, **options)
    session.console.print(str(plan))
    if not plan.fits:
        raise MemoryError(f"this would not fit in memory: {wanted.remedy}\n{plan}")
    budgeted = wanted.max_matvecs is not None
    with (
        session.notes(known=ConvergenceWarning),
        show_progress(session.quiet, "compiling the solver", budgeted) as display,
    ):
        result: EigenResult = cx.eigsh(
            op,
            wanted.k,
            relative_to=wanted.relative_to,
            max_matvecs=wanted.max_matvecs,
            seed=wanted.seed,
            block_size=plan.block_size,
            max_basis=plan.max_basis,
            basis_dtype=plan.basis_dtype,
            callback=display.update,
            **options,
        )
    return result
