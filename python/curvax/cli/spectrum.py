"""`curvax spectrum`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Seed,
    Which,
    app,
    check_limit,
    check_matvecs,
    describe,
    fail,
    make_directory,
)
from curvax.cli.machine import device, kernels
from curvax.cli.problem import (
    NAMES,
    Kind,
    Microbatch,
    OperatorName,
    OptionalTarget,
    Where,
    make_operator,
    operator_of,
    problem_facts,
)
from curvax.cli.report import report
from curvax.cli.solve import solve
from curvax.display import open_stdout, print_facts, show_progress

if TYPE_CHECKING:
    from curvax.results import EigenResult


@app.command()
def spectrum(
    context: typer.Context,
    target: OptionalTarget = None,
    model: Annotated[
        Literal["smollm2"] | None,
        typer.Option(
            help="In place of MODULE:FUNCTION: SmolLM2-135M-Instruct, with weights rounded to "
            "four bits."
        ),
    ] = None,
    count: Count = 5,
    operator: OperatorName = "hessian",
    kind: Kind = None,
    where: Where = None,
    microbatch_size: Microbatch = None,
    which: Which = "LM",
    tol: OptionalTol = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="With --model: tokens of the text; one predicts the next."
        ),
    ] = 128,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            readable=True,
            help="With --model: text to analyse, in place of a paragraph of our own.",
        ),
    ] = None,
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
    check_limit(limit)
    if (target is None) == (model is None):
        raise typer.BadParameter(
            "give either MODULE:FUNCTION or --model", param_hint="MODULE:FUNCTION"
        )
    make_directory(out)
    console = open_stdout(quiet)
    context.params["tol"] = tol = tol or (1e-3 if model is None else 1e-2)
    options = {"which": which, "tol": tol, "certify": certify}
    try:
        with show_progress(quiet, "loading JAX and the model; compiling its loss"):
            if target is None:
                op = _smollm2(operator, kind, where, microbatch_size, tokens, text)
            else:
                op = make_operator(target, operator, kind, where, microbatch_size)
        name = "SmolLM2-135M" if target is None else target
        wanted = f"{count} eigenvalues ({which}) of the {NAMES[operator]}, tol {tol:g}"
        print_facts(
            console,
            (_smollm2_facts(op, tokens) if target is None else problem_facts(target, op, operator))
            | {"wanted": wanted},
        )
        result = _solve(console, op, count, limit, options, quiet, max_matvecs, seed)
        title = f"{NAMES[operator]} of {name}: outermost eigenvalues"
        end = report(console, context, op, result, count, out, title)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except INPUT_ERRORS as error:
        fail(describe(error), BAD_INPUT)
    raise end


def _smollm2(
    operator: str,
    kind: Any,
    where: list[str] | None,
    microbatch_size: int | None,
    length: int,
    text: Path | None,
) -> Any:
    import jax.numpy as jnp

    import curvax as cx
    from curvax.demo import llama, smollm2

    if text is None:
        batch = smollm2.batch(length)
    else:
        ids = smollm2.tokenizer().encode(text.read_text()).ids
        if len(ids) < length:
            raise ValueError(f"--text has {len(ids)} tokens, fewer than --tokens {length}")
        batch = jnp.asarray([ids[:length]], jnp.int32)
    params, config = smollm2.load()
    model = cx.Model(
        params,
        lambda p, b: llama.outputs(p, b[:, :-1], config),
        cx.losses.LinearCrossEntropy(labels=lambda b: b[:, 1:]),
    )
    return operator_of(model, batch, operator, kind, where, microbatch_size)


def _smollm2_facts(op: Any, tokens: int) -> dict[str, str]:
    return {
        "model": f"SmolLM2-135M-Instruct with Q4_1-rounded weights, {op.shape[0]:,} parameters",
        "text": f"{tokens} tokens, {tokens - 1} predicted",
        "loss": f"{float(op.loss):.4f} nats/token",
        "device": device(),
        "kernels": kernels(),
    }


def _solve(
    console: Console,
    op: Any,
    count: int,
    limit: float | None,
    options: dict[str, Any],
    quiet: bool,
    max_matvecs: int | None,
    seed: int,
) -> EigenResult:
    import curvax as cx

    with show_progress(quiet, "compiling the matrix-vector product; forecasting its memory"):
        plan = cx.plan(op, count, **options, limit=None if limit is None else int(limit * 1e9))
    console.print(str(plan))
    if not plan.fits:
        raise MemoryError(f"this would not fit in memory: raise --limit or lower -k\n{plan}")
    chosen = {
        "block_size": plan.block_size,
        "max_basis": plan.max_basis,
        "basis_dtype": plan.basis_dtype,
    }
    return solve(console, op, count, quiet, max_matvecs, {**options, **chosen, "seed": seed})
