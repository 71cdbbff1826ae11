"""`curvax demo`."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from curvax.cli.display import open_stdout, print_facts, show_progress
from curvax.cli.machine import device, kernels, start_jax
from curvax.cli.report import report
from curvax.cli.solve import solve

if TYPE_CHECKING:
    from curvax.results import EigenResult


def _check_size(high: int, low: int, max_matvecs: int | None) -> None:
    """Refuse what the shipped model cannot give, before it is loaded."""
    from curvax.memory import available_bytes

    both, k = "--high, --low", high + low
    facts = importlib.resources.files("curvax").joinpath("demo", "gpt.json").read_text()
    n = json.loads(facts)["parameters"]
    if not 1 <= k <= n:
        message = f"ask for 1 to {n} eigenvalues in all, got {high} + {low} = {k}"
        raise typer.BadParameter(message, param_hint=both)
    check_matvecs(max_matvecs, k, both)
    # The basis and the result, in float32.
    needed, free = 2 * k * n * 4, available_bytes()
    if needed > free:
        message = f"{k} eigenvalues take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        raise typer.BadParameter(f"{message}; ask for fewer", param_hint=both)


@app.command()
def demo(
    context: typer.Context,
    out: Out = Path("curvax-demo"),
    high: Annotated[
        int, typer.Option(min=0, metavar="N", help="Eigenvalues from the high end.")
    ] = 10,
    low: Annotated[int, typer.Option(min=0, metavar="N", help="Eigenvalues from the low end.")] = 5,
    tol: Tol = 1e-3,
    max_matvecs: MaxMatvecs = None,
    seed: Seed = 0,
    certify: Certify = "residuals",
    quiet: Quiet = False,
) -> None:
    """Analyse a small trained GPT: its Hessian's outermost eigenvalues.

    Writes spectrum.npz, .json, .txt and .png, and config.json, into DIR. The exit status is 0 if
    every eigenpair converged, 3 if not, 2 for bad input and 130 after Ctrl-C, which keeps what the
    solve knows.
    """
    try:
        start_jax()
    except ValueError as error:
        fail(str(error), BAD_INPUT)
    _check_size(high, low, max_matvecs)
    make_directory(out)
    console = open_stdout(quiet)
    try:
        op, result = _analyse(console, (high, low), tol, max_matvecs, seed, certify, quiet)
        title = "Hessian of the demo GPT: outermost eigenvalues"
        end = report(console, context, op, result, high + low, out, title)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except MemoryError:
        fail(f"too little memory for {high + low} eigenvalues: lower --high, --low", BAD_INPUT)
    except (ValueError, ImportError) as error:
        fail(str(error), BAD_INPUT)
    raise end


def _analyse(
    console: Console,
    k: tuple[int, int],
    tol: float,
    max_matvecs: int | None,
    seed: int,
    certify: Certify,
    quiet: bool,
) -> tuple[Any, EigenResult]:
    with show_progress(quiet, "loading JAX and the model; compiling its loss"):
        import jax

        import curvax as cx
        from curvax.models import gpt, load

        params, batch = load()
        op = cx.hessian(gpt.loss, params, batch)

    sequences, length = batch.shape
    leaves = len(jax.tree.leaves(params))
    rows = {
        "model": f"trained byte-level GPT, {op.shape[0]:,} parameters in {leaves} arrays",
        "batch": f"{sequences} sequences, {sequences * (length - 1):,} predicted bytes",
        "loss": f"{float(op.loss):.4f} nats/byte",
        "device": device(),
        "kernels": kernels(),
        "wanted": f"{k[0]} highest and {k[1]} lowest eigenvalues of the Hessian, tol {tol:g}",
    }
    print_facts(console, rows)

    options = {"which": "BE", "tol": tol, "seed": seed, "certify": certify}
    return op, solve(console, op, k, quiet, max_matvecs, options)
