"""`curvax plan`."""

from __future__ import annotations

import typer

from curvax.cli.app import (
    BAD_INPUT,
    INPUT_ERRORS,
    INTERRUPTED,
    Count,
    Limit,
    Quiet,
    Tol,
    Which,
    app,
    check_limit,
    describe,
    fail,
)
from curvax.cli.problem import (
    Kind,
    Microbatch,
    OperatorName,
    Target,
    Where,
    make_operator,
    problem_facts,
)
from curvax.display import open_stdout, print_facts, show_progress


@app.command()
def plan(
    target: Target,
    count: Count = 5,
    operator: OperatorName = "hessian",
    kind: Kind = None,
    where: Where = None,
    microbatch_size: Microbatch = None,
    which: Which = "LM",
    tol: Tol = 1e-3,
    limit: Limit = None,
    quiet: Quiet = False,
) -> None:
    """Forecast the memory and the products of a spectrum, and make none.

    The exit status is 0 if the solve would fit, and 2 if not, or for bad input.
    """
    check_limit(limit)
    console = open_stdout(quiet)
    try:
        import curvax as cx

        with show_progress(quiet, "loading JAX and the model; compiling its loss"):
            op = make_operator(target, operator, kind, where, microbatch_size)
        print_facts(console, problem_facts(target, op, operator))
        with show_progress(quiet, "compiling the matrix-vector product; forecasting its memory"):
            bound = None if limit is None else int(limit * 1e9)
            found = cx.plan(op, count, which=which, tol=tol, limit=bound)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except INPUT_ERRORS as error:
        fail(describe(error), BAD_INPUT)
    console.print(str(found))
    raise typer.Exit(0 if found.fits else BAD_INPUT)
