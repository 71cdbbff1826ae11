"""`curvax plan`."""

from __future__ import annotations

import typer

from curvax.cli.app import (
    BAD_INPUT,
    INPUT_ERRORS,
    INTERRUPTED,
    Count,
    Limit,
    OptionalTol,
    Quiet,
    Which,
    app,
    describe,
    fail,
    limit_bytes,
)
from curvax.cli.display import open_stdout, print_facts, show_progress
from curvax.cli.problem import (
    Kind,
    Microbatch,
    OperatorName,
    OptionalTarget,
    Where,
    make_operator,
    problem_facts,
)
from curvax.cli.smollm2 import (
    ModelName,
    Text,
    Tokens,
    check_source,
    smollm2_facts,
    smollm2_operator,
)


@app.command()
def plan(
    target: OptionalTarget = None,
    model: ModelName = None,
    count: Count = 5,
    operator: OperatorName = "hessian",
    kind: Kind = None,
    where: Where = None,
    microbatch_size: Microbatch = None,
    which: Which = "LM",
    tol: OptionalTol = None,
    tokens: Tokens = 128,
    text: Text = None,
    limit: Limit = None,
    quiet: Quiet = False,
) -> None:
    """Forecast the memory and the products of a spectrum, and make none.

    MODULE:FUNCTION, --model and the default of --tol are as for curvax spectrum. The exit status is
    0 if the solve would fit, and 2 if not, or for bad input.
    """
    bound = limit_bytes(limit)
    check_source(target, model)
    console = open_stdout(quiet)
    options = (operator, kind, where, microbatch_size)
    try:
        import curvax as cx

        with show_progress(quiet, "loading JAX and the model; compiling its loss"):
            if target is None:
                op = smollm2_operator(tokens, text, *options)
                facts = smollm2_facts(op, tokens)
            else:
                op = make_operator(target, *options)
                facts = problem_facts(target, op, operator)
        print_facts(console, facts)
        with show_progress(quiet, "compiling the matrix-vector product; forecasting its memory"):
            tol = tol or (1e-3 if model is None else 1e-2)
            found = cx.plan(op, count, which=which, tol=tol, limit=bound)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except INPUT_ERRORS as error:
        fail(describe(error), BAD_INPUT)
    console.print(str(found))
    raise typer.Exit(0 if found.fits else BAD_INPUT)
