"""How a result is printed and written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from curvax.cli.app import INTERRUPTED, NOT_CONVERGED
from curvax.cli.files import write_config, write_result
from curvax.display import print_facts
from curvax.interrupt import InterruptFlag

if TYPE_CHECKING:
    from curvax.results import EigenResult

_COMPLETE = {
    None: "not checked (--certify complete searches for missed ones)",
    True: "searched: none was left to find",
    False: "searched until the products ran out: some may be missing",
}


def report(
    console: Console,
    context: typer.Context,
    op: Any,
    result: EigenResult,
    k: tuple[int, int],
    out: Path,
    title: str,
) -> typer.Exit:
    """Print and write a result, which an interrupt does not cut short.

    Args:
        console: where to print.
        context: of the command, whose options are written too.
        op: the operator.
        result: what `eigsh` returned.
        k: how many were asked for from the high end and from the low end.
        out: where `spectrum.npz`, `.json`, `.txt` and, with matplotlib, `.png` go, and
            `config.json`.
        title: of the picture.

    Returns:
        The end of the command, to be raised.
    """
    with InterruptFlag() as late:
        _print_result(console, result, k)
        write_result(console, result, out / "spectrum", title)
        write_config(console, context, op, out)
    if result.interrupted or late:
        return typer.Exit(INTERRUPTED)
    return typer.Exit(0 if result.all_converged else NOT_CONVERGED)


def _print_result(console: Console, result: EigenResult, k: tuple[int, int]) -> None:
    marks = ("✓", "✗") if console.encoding.lower().startswith("utf") else ("yes", "NO")
    table = Table()
    for name in ("index", "eigenvalue", "residual", "bound", "converged"):
        table.add_column(name, justify="center" if name == "converged" else "right")
    columns = (result.eigenvalues, result.residuals, result.bounds, result.converged)
    for i, (value, residual, bound, converged) in enumerate(zip(*columns, strict=True)):
        table.add_row(
            _index(i, len(result.eigenvalues), k),
            _value(value),
            _measured(residual),
            _measured(bound),
            marks[0] if converged else marks[1],
            style=None if converged else "red",
            end_section=i == k[0] - 1,
        )
    console.print(table)
    print_facts(console, _facts(result))
    console.print(_verdict(result, sum(k)), style="green" if result.all_converged else "bold red")


def _index(i: int, found: int, k: tuple[int, int]) -> str:
    """From 1 at the high end, from -1 at the low end, as Python counts in a list."""
    if found < sum(k):
        return "?"  # interrupted so early that it is not known which these are
    return str(i + 1 if i < k[0] else i - found)


def _value(value: float) -> str:
    plain = value == 0 or 1e-3 <= abs(value) < 1e7
    return f"{value:.5f}" if plain else f"{value:.4e}"


def _measured(residual: float) -> str:
    return f"{residual:.2e}" if math.isfinite(residual) else "-"


def _facts(result: EigenResult) -> dict[str, str]:
    products, seconds = result.num_matvecs, dict(result.seconds)
    total = seconds.pop("total")
    parts = ", ".join(f"{part} {spent:.2f}" for part, spent in seconds.items())
    return {
        "tol_effective": f"{result.tol_effective:.2e} of max |eigenvalue|",
        "noise": f"{result.noise:.1e} of max |eigenvalue|",
        "orthogonality": f"{result.orthogonality:.1e}",
        "complete": _COMPLETE[result.complete],
        "products": f"{products.solve} solve + {products.verification} verification",
        "restarts": str(result.num_restarts),
        "seconds": f"{total:.2f} in all: {parts}",
    }


def _verdict(result: EigenResult, wanted: int) -> str:
    k, done = len(result.converged), int(result.converged.sum())
    if result.interrupted:
        # An early interrupt finds fewer pairs than were asked for.
        return f"interrupted: {done} of the {wanted} wanted eigenpairs converged"
    if result.all_converged:
        return f"all {k} eigenpairs converged"
    return (
        f"not converged: {k - done} of {k} eigenpairs, after {result.num_matvecs.solve} products; "
        "raise --max-matvecs or --tol"
    )
