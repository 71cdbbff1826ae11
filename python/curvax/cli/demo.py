"""`curvax demo`."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from curvax.cli.app import (
    BAD_INPUT,
    INTERRUPTED,
    NOT_CONVERGED,
    Certify,
    app,
    check_tol,
    fail,
    make_directory,
)
from curvax.cli.machine import device, kernels
from curvax.cli.report import print_result, write_files
from curvax.cli.solve import solve
from curvax.display import open_stdout, print_facts, show_progress
from curvax.krylov.interrupt import InterruptFlag

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
    if max_matvecs is not None and max_matvecs < k:
        message = f"{k} eigenvalues need at least as many products, got {max_matvecs}"
        raise typer.BadParameter(f"{message}; raise it or lower {both}", param_hint="--max-matvecs")
    # The basis and the result, in float32.
    needed, free = 2 * k * n * 4, available_bytes()
    if needed > free:
        message = f"{k} eigenvalues take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        raise typer.BadParameter(f"{message}; ask for fewer", param_hint=both)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the files go; made if need be.")
    ] = Path("curvax-demo"),
    high: Annotated[
        int, typer.Option(min=0, metavar="N", help="Eigenvalues from the high end.")
    ] = 10,
    low: Annotated[int, typer.Option(min=0, metavar="N", help="Eigenvalues from the low end.")] = 5,
    tol: Annotated[
        float,
        typer.Option(
            callback=check_tol,
            metavar="X",
            help="Largest residual allowed, relative to the largest absolute eigenvalue; "
            "between 0 and 1.",
        ),
    ] = 1e-3,
    max_matvecs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stop the solve after this many products."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the starting vector.")] = 0,
    certify: Annotated[
        Certify,
        typer.Option(help="Prove residuals only, or also search for missed eigenvalues."),
    ] = "residuals",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Analyse a small trained GPT: its Hessian's outermost eigenvalues.

    Writes spectrum.npz, spectrum.json and spectrum.png into DIR. The exit status is 0 if every
    eigenpair converged, 3 if not, 2 for bad input and 130 after Ctrl-C, which keeps what the solve
    knows.
    """
    _check_size(high, low, max_matvecs)
    make_directory(out)
    console = open_stdout(quiet)
    try:
        result = _analyse(console, (high, low), tol, max_matvecs, seed, certify, quiet)
        with InterruptFlag() as late:
            print_result(console, result, (high, low))
            write_files(console, result, out, "Hessian of the demo GPT: outermost eigenvalues")
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except MemoryError:
        fail(f"too little memory for {high + low} eigenvalues: lower --high, --low", BAD_INPUT)
    except (ValueError, ImportError) as error:
        fail(str(error), BAD_INPUT)
    if result.interrupted or late:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if result.all_converged else NOT_CONVERGED)


def _analyse(
    console: Console,
    k: tuple[int, int],
    tol: float,
    max_matvecs: int | None,
    seed: int,
    certify: Certify,
    quiet: bool,
) -> EigenResult:
    with show_progress(quiet, "loading JAX and the model; compiling its loss"):
        import jax

        import curvax as cx
        from curvax.demo import gpt, load

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
    return solve(console, op, k, quiet, max_matvecs, options)
