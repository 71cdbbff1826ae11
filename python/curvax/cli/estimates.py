"""`curvax trace`, `curvax diagonal` and `curvax density`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from curvax.cli.app import (
    BAD_INPUT,
    INPUT_ERRORS,
    INTERRUPTED,
    NOT_CONVERGED,
    Out,
    Quiet,
    app,
    describe,
    fail,
    make_directory,
)
from curvax.cli.display import open_stdout, print_facts, show_counts, show_progress
from curvax.cli.files import write_config, write_result
from curvax.cli.problem import (
    NAMES,
    Kind,
    Microbatch,
    OperatorName,
    Target,
    Where,
    make_operator,
    problem_facts,
)
from curvax.interrupt import InterruptFlag

EstimateSeed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the random vectors.")]
Products = Annotated[
    int, typer.Option("--num-matvecs", min=1, metavar="N", help="Products with the operator.")
]


@app.command()
def trace(
    context: typer.Context,
    target: Target,
    operator: OperatorName = "hessian",
    kind: Kind = None,
    where: Where = None,
    microbatch_size: Microbatch = None,
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
    out: Out = Path("curvax-trace"),
    quiet: Quiet = False,
) -> None:
    """Estimate the trace, with its standard error.

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

    operands = (target, operator, kind, where, microbatch_size)
    _run(context, "trace", operands, options, standing, reached, out, quiet)


@app.command()
def diagonal(
    context: typer.Context,
    target: Target,
    operator: OperatorName = "hessian",
    kind: Kind = None,
    where: Where = None,
    microbatch_size: Microbatch = None,
    method: Annotated[
        Literal["auto", "hutchinson", "xdiag", "exact"],
        typer.Option(help="The estimator; auto is exact where the products suffice."),
    ] = "auto",
    num_matvecs: Products = 100,
    seed: EstimateSeed = 0,
    out: Out = Path("curvax-diagonal"),
    quiet: Quiet = False,
) -> None:
    """Find or estimate the diagonal, and its standard errors.

    Writes diagonal.npz, .json, .txt and .png, and config.json, into DIR. The exit status is 0, 2
    for bad input and 130 after Ctrl-C.
    """
    options = {"method": method, "num_matvecs": num_matvecs, "seed": seed}
    operands = (target, operator, kind, where, microbatch_size)
    _run(context, "diagonal", operands, options, lambda _: "", lambda _: True, out, quiet)


@app.command()
def density(
    context: typer.Context,
    target: Target,
    operator: OperatorName = "hessian",
    kind: Kind = None,
    where: Where = None,
    microbatch_size: Microbatch = None,
    num_runs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Random starting vectors.")
    ] = 10,
    num_steps: Annotated[
        int, typer.Option(min=2, metavar="N", help="Lanczos steps, so products, of each.")
    ] = 80,
    width: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Width of the smoothing; chosen by the resolution if not set."
        ),
    ] = None,
    seed: EstimateSeed = 0,
    out: Out = Path("curvax-density"),
    quiet: Quiet = False,
) -> None:
    """Estimate the density of all eigenvalues, with a band of 95 %.

    Writes density.npz, .json, .txt and .png, and config.json, into DIR. The exit status is 0, 2 for
    bad input and 130 after Ctrl-C.
    """
    options = {"num_runs": num_runs, "num_steps": num_steps, "width": width, "seed": seed}
    operands = (target, operator, kind, where, microbatch_size)

    def standing(progress: Any) -> str:
        return f"{progress.runs}/{progress.num_runs} runs"

    _run(context, "density", operands, options, standing, lambda _: True, out, quiet)


def _run(
    context: typer.Context,
    name: str,
    operands: tuple[Any, ...],
    options: dict[str, Any],
    standing: Callable[[Any], str],
    reached: Callable[[Any], bool],
    out: Path,
    quiet: bool,
) -> None:
    """Make the operator, estimate, print and write.

    Args:
        context: of the command.
        name: of the command, and of its files.
        operands: the arguments of `make_operator`.
        options: those of the estimator.
        standing: what to say of a progress, besides its products.
        reached: whether a result is what was asked for.
        out: the directory.
        quiet: print nothing but errors.
    """
    make_directory(out)
    console = open_stdout(quiet)
    target, operator = operands[:2]
    try:
        with show_progress(quiet, "loading JAX and the model; compiling its loss"):
            op = make_operator(*operands)
        import curvax as cx

        known: dict[str, Any] = {
            "density": cx.spectral_density,
            "trace": cx.trace,
            "diagonal": cx.diagonal,
        }
        print_facts(console, problem_facts(target, op, operator))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            with show_counts(quiet, "compiling the matrix-vector product", standing) as callback:
                result = known[name](op, callback=callback, **options)
        with InterruptFlag(warns=False) as late:
            console.print(str(result))
            # The table says whether it was interrupted.
            notes = [w.message for w in caught if w.category is not cx.InterruptWarning]
            for note in dict.fromkeys(map(str, notes)):
                console.print(f"note: {note}", style="yellow")
            title = f"{name} of the {NAMES[operator]} of {target}"
            write_result(console, result, out / name, title[0].upper() + title[1:])
            write_config(console, context, op, out)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except INPUT_ERRORS as error:
        fail(describe(error), BAD_INPUT)
    if result.interrupted or late:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if reached(result) else NOT_CONVERGED)
