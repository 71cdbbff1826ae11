"""`curvax spectrum`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from curvax.cli.app import (
    BAD_INPUT,
    INTERRUPTED,
    Certify,
    MaxMatvecs,
    Out,
    Quiet,
    Seed,
    Tol,
    app,
    check_matvecs,
    fail,
    make_directory,
)
from curvax.cli.machine import device, kernels
from curvax.cli.report import report
from curvax.cli.solve import solve
from curvax.display import open_stdout, print_facts, show_progress

if TYPE_CHECKING:
    from curvax.results import EigenResult

_OPERATORS = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}


@app.command()
def spectrum(
    model: Annotated[
        Literal["smollm2"],
        typer.Option(help="SmolLM2-135M-Instruct, with weights rounded to four bits."),
    ],
    count: Annotated[
        int, typer.Option("--count", "-k", min=1, metavar="N", help="Eigenvalues.")
    ] = 5,
    operator: Annotated[
        Literal["hessian", "ggn"], typer.Option(help="The Hessian, or the Gauss-Newton matrix.")
    ] = "hessian",
    which: Annotated[
        Literal["LM", "LA", "SA", "BE"],
        typer.Option(help="Largest magnitude, largest, smallest, or both ends."),
    ] = "LM",
    tol: Tol = 1e-2,
    tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens of the text; one predicts the next.")
    ] = 128,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            readable=True,
            help="Text to analyse, in place of a paragraph of our own.",
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Memory that the solve may add; what is free, if not set."),
    ] = None,
    max_matvecs: MaxMatvecs = None,
    seed: Seed = 0,
    certify: Certify = "residuals",
    out: Out = Path("curvax-spectrum"),
    quiet: Quiet = False,
) -> None:
    """Analyse a language model: outermost eigenvalues of its loss.

    They are those of the Hessian or of the Gauss-Newton matrix. Forecasts the memory first, and
    chooses the size and the storage of the basis to fit. Writes spectrum.npz, spectrum.json and
    spectrum.png into DIR. The exit status is 0 if every eigenpair converged, 3 if not, 2 for bad
    input (also if the solve would not fit) and 130 after Ctrl-C, which keeps what the solve knows.
    """
    check_matvecs(max_matvecs, count, "-k")
    if limit is not None and not limit > 0:
        raise typer.BadParameter(f"expected a positive number, got {limit:g}", param_hint="--limit")
    make_directory(out)
    console = open_stdout(quiet)
    options = {"which": which, "tol": tol, "certify": certify}
    try:
        with show_progress(quiet, "loading JAX and the model; compiling its loss"):
            op = _operator(operator, tokens, text)
        _print_model(console, op, operator, count, which, tol, tokens)
        result = _solve(console, op, count, limit, options, quiet, max_matvecs, seed)
        low = {"SA": count, "BE": count // 2}.get(which, 0)
        title = f"{_OPERATORS[operator]} of SmolLM2-135M: outermost eigenvalues"
        end = report(console, result, (count - low, low), out, title)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except (ValueError, ImportError, MemoryError, OSError) as error:
        fail(str(error), BAD_INPUT)
    raise end


def _operator(operator: str, length: int, text: Path | None) -> Any:
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
    if operator == "hessian":
        return cx.hessian(lambda p, b: llama.loss(p, b, config), params, batch)
    loss = cx.losses.LinearCrossEntropy(labels=lambda b: b[:, 1:])
    return cx.ggn(lambda p, b: llama.outputs(p, b[:, :-1], config), loss, params, batch)


def _print_model(
    console: Console, op: Any, operator: str, count: int, which: str, tol: float, tokens: int
) -> None:
    rows = {
        "model": f"SmolLM2-135M-Instruct with Q4_1-rounded weights, {op.shape[0]:,} parameters",
        "text": f"{tokens} tokens, {tokens - 1} predicted",
        "loss": f"{float(op.loss):.4f} nats/token",
        "device": device(),
        "kernels": kernels(),
        "wanted": f"{count} eigenvalues ({which}) of the {_OPERATORS[operator]}, tol {tol:g}",
    }
    print_facts(console, rows)


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
