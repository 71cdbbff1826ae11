"""`curvax spectrum`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from curvax.cli.app import (
    BAD_INPUT,
    INPUT_ERRORS,
    INTERRUPTED,
    Certify,
    Count,
    Limit,
    MaxMatvecs,
    OptionalTol,
    Out,
    Quiet,
    RelativeTo,
    Seed,
    Which,
    app,
    check_matvecs,
    describe,
    fail,
    limit_bytes,
    make_directory,
)
from curvax.cli.display import open_stdout, print_facts, show_progress
from curvax.cli.problem import (
    NAMES,
    Kind,
    Microbatch,
    OperatorName,
    OptionalTarget,
    Where,
    make_operator,
    problem_facts,
)
from curvax.cli.report import report
from curvax.cli.smollm2 import (
    ModelName,
    Text,
    Tokens,
    check_source,
    smollm2_facts,
    smollm2_operator,
)
from curvax.cli.solve import solve

if TYPE_CHECKING:
    from curvax.results import EigenResult


@app.command()
def spectrum(
    context: typer.Context,
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
    relative_to: RelativeTo = None,
    text: Text = None,
    limit: Limit = None,
    max_matvecs: MaxMatvecs = None,
    seed: Seed = 0,
    certify: Certify = "residuals",
    out: Out = Path("curvax-spectrum"),
    quiet: Quiet = False,
) -> None:
    """Analyse a model of one's own: outermost eigenvalues of its loss.

    MODULE:FUNCTION names a function that returns (model, batches). The eigenvalues are those of the
    Hessian, the Gauss-Newton or the Fisher matrix. Forecasts the memory first, and chooses the size
    and the storage of the basis to fit. Writes spectrum.npz, .json, .txt and .png, and config.json
    with all options, into DIR. The default of --tol is 1e-3, and 1e-2 with --model. The exit status
    is 0 if every eigenpair converged, 3 if not, 2 for bad input (also if the solve would not fit)
    and 130 after Ctrl-C, which keeps what the solve knows.
    """
    check_matvecs(max_matvecs, count, "-k")
    bound = limit_bytes(limit)
    check_source(target, model)
    make_directory(out)
    console = open_stdout(quiet)
    context.params["tol"] = tol = tol or (1e-3 if model is None else 1e-2)
    options = {"which": which, "tol": tol, "certify": certify}
    try:
        with show_progress(quiet, "loading JAX and the model; compiling its loss"):
            options_of_operator = (operator, kind, where, microbatch_size)
            if target is None:
                op = smollm2_operator(tokens, text, *options_of_operator)
            else:
                op = make_operator(target, *options_of_operator)
        name = "SmolLM2-135M" if target is None else target
        wanted = f"{count} eigenvalues ({which}) of the {NAMES[operator]}, tol {tol:g}"
        print_facts(
            console,
            (smollm2_facts(op, tokens) if target is None else problem_facts(target, op, operator))
            | {"wanted": wanted},
        )
        own = {"seed": seed, "relative_to": relative_to}
        result = _solve(console, op, count, bound, options, quiet, max_matvecs, own)
        title = f"{NAMES[operator]} of {name}: outermost eigenvalues"
        end = report(console, context, op, result, count, out, title)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except INPUT_ERRORS as error:
        fail(describe(error), BAD_INPUT)
    raise end


def _solve(
    console: Console,
    op: Any,
    count: int,
    limit: int | None,
    options: dict[str, Any],
    quiet: bool,
    max_matvecs: int | None,
    own: dict[str, Any],
) -> EigenResult:
    import curvax as cx

    with show_progress(quiet, "compiling the matrix-vector product; forecasting its memory"):
        plan = cx.plan(op, count, **options, limit=limit)
    console.print(str(plan))
    if not plan.fits:
        raise MemoryError(f"this would not fit in memory: raise --limit or lower -k\n{plan}")
    chosen = {
        "block_size": plan.block_size,
        "max_basis": plan.max_basis,
        "basis_dtype": plan.basis_dtype,
    }
    return solve(console, op, count, quiet, max_matvecs, {**options, **chosen, **own})
