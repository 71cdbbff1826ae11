"""`curvax trace`, `curvax diagonal` and `curvax density`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from curvax.cli.display import show_counts
from curvax.cli.exits import Status
from curvax.cli.session import Session, command
from curvax.warnings import InterruptWarning

EstimateSeed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the random vectors.")]
Products = Annotated[
    int,
    typer.Option("--num-matvecs", min=1, metavar="N", help="How many products with the operator."),
]


@command()
def trace(
    session: Session,
    method: Annotated[
        Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace"],
        typer.Option(help="The estimator; auto chooses by the operator and the products."),
    ] = "auto",
    num_matvecs: Products = 100,
    until: Annotated[
        float | None,
        typer.Option(metavar="X", help="Go on until the standard error is at most X."),
    ] = None,
    max_matvecs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --until: stop after this many products."),
    ] = None,
    seed: EstimateSeed = 0,
) -> Status:
    """Estimate the trace of a problem, with its standard error.

    Writes trace.npz, .json, .txt and .png, and config.json, into DIR. The exit status is 0, or 3 if
    the standard error stayed above --until, 2 for bad input and 130 after Ctrl-C.
    """
    options: dict[str, Any] = {"method": method, "num_matvecs": num_matvecs, "seed": seed}
    if until is not None:
        options["until"] = until
    if max_matvecs is not None:
        options["max_matvecs"] = max_matvecs

    def reached(result: Any) -> bool:
        return until is None or bool(result.stderr <= until)

    def standing(progress: Any) -> str:
        return f"{progress.estimate:.5g} ± {progress.stderr:.1e}"

    return _estimate(session, options, standing, reached)


@command()
def diagonal(
    session: Session,
    method: Annotated[
        Literal["auto", "hutchinson", "xdiag", "exact"],
        typer.Option(help="The estimator; auto is exact where the products suffice."),
    ] = "auto",
    num_matvecs: Products = 100,
    seed: EstimateSeed = 0,
) -> Status:
    """Find or estimate the diagonal of a problem.

    An estimated one comes with its standard errors. Writes diagonal.npz, .json, .txt and .png, and
    config.json, into DIR. The exit status is 0, 2 for bad input and 130 after Ctrl-C.
    """
    options = {"method": method, "num_matvecs": num_matvecs, "seed": seed}
    return _estimate(session, options)


@command()
def density(
    session: Session,
    num_runs: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many random starting vectors.")
    ] = 10,
    num_steps: Annotated[
        int, typer.Option(min=2, metavar="N", help="How many Lanczos steps, so products, of each.")
    ] = 80,
    width: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Width of the smoothing; chosen by the resolution if not set."
        ),
    ] = None,
    seed: EstimateSeed = 0,
) -> Status:
    """Estimate the density of all eigenvalues of a problem.

    It comes with a band of 95 %. Writes density.npz, .json, .txt and .png, and config.json, into
    DIR. The exit status is 0, 2 for bad input and 130 after Ctrl-C.
    """

    def standing(progress: Any) -> str:
        return f"{progress.runs}/{progress.num_runs} runs"

    options = {"num_runs": num_runs, "num_steps": num_steps, "width": width, "seed": seed}
    return _estimate(session, options, standing)


def _estimate(
    session: Session,
    options: dict[str, Any],
    standing: Callable[[Any], str] = lambda _: "",
    reached: Callable[[Any], bool] = lambda _: True,
) -> Status:
    """Estimate, print and write.

    Args:
        session: the command's.
        options: of the estimator that the command is called after.
        standing: what to say of a progress, besides its products.
        reached: whether a result is what was asked for.
    """
    op = session.load()
    import curvax as cx

    estimators: dict[str, Callable[..., Any]] = {
        "trace": cx.trace,
        "diagonal": cx.diagonal,
        "density": cx.spectral_density,
    }
    with (
        # The table says whether it was interrupted.
        session.notes(known=InterruptWarning),
        show_counts(session.quiet, "compiling the matrix-vector product", standing) as callback,
    ):
        result = estimators[session.command](op, callback=callback, **options)
    name, problem = session.command, session.problem
    title = f"{name.capitalize()} of the {problem.matrix} of {problem.target}"

    def show() -> None:
        session.console.print(str(result))

    return session.finish(op, result, name, title, show, reached(result))
