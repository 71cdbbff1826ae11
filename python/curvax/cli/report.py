"""How eigenpairs are printed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from curvax.cli.display import print_facts, seconds_by_part

if TYPE_CHECKING:
    from curvax.results import EigenResult
    from curvax.typing import FloatArray

_COMPLETE = {
    None: "not checked (--certify complete searches for missed ones)",
    True: "searched: none was left to find",
    False: "searched until the products ran out: some may be missing",
}


def print_result(console: Console, result: EigenResult, wanted: int) -> None:
    """Print the table, the facts and the verdict of a result of `wanted` pairs."""
    from curvax.results.tables import measured, place, verdict

    marks = ("✓", "✗") if console.encoding.lower().startswith("utf") else ("yes", "NO")
    table = Table()
    for name in ("index", "eigenvalue", "residual", "bound", "rel. bound", "converged"):
        table.add_column(name, justify="center" if name == "converged" else "right")
    columns = (result.eigenvalues, result.residuals, result.bounds, result.converged)
    shown = _value_format(result)
    for i, (value, residual, bound, converged) in enumerate(zip(*columns, strict=True)):
        table.add_row(
            place(result.indices[i]),
            format(value, shown),
            measured(residual),
            measured(bound),
            measured(result.relative_bounds[i]),
            verdict(residual, converged, marks),
            style=None if converged else "red",
            end_section=any(result.indices[i] > 0 > low for low in result.indices[i + 1 : i + 2]),
        )
    console.print(table)
    print_facts(console, _facts(result))
    console.print(_verdict(result, wanted), style="green" if result.all_converged else "bold red")


def _value_format(result: EigenResult) -> str:
    """Five digits behind the point, or of the mantissa where the points would not tell much."""
    largest = max(map(abs, result.eigenvalues), default=0.0)
    return ".5f" if largest == 0 or 0.1 <= largest < 1e6 else ".5e"


def _facts(result: EigenResult) -> dict[str, str]:
    return {
        "tol_effective": f"{_range(result.tol_effective)} of max |eigenvalue|",
        "noise": f"{result.noise:.1e} of max |eigenvalue|",
        "orthogonality": f"{result.orthogonality:.1e}",
        "complete": _COMPLETE[result.complete],
        "products": f"{result.num_matvecs} solve + {result.num_verification} verification",
        "restarts": str(result.num_restarts),
        "seconds": seconds_by_part(result.seconds),
    }


def _range(values: FloatArray) -> str:
    ends = sorted({f"{values.min():.2e}", f"{values.max():.2e}"}, key=float)
    return " to ".join(ends)


def _verdict(result: EigenResult, wanted: int) -> str:
    k, done = len(result.converged), int(result.converged.sum())
    if result.interrupted:
        # An early interrupt finds fewer pairs than were asked for.
        found = f"interrupted: {done} of the {wanted} wanted eigenpairs converged"
        unknown = sum(map(math.isnan, result.residuals))
        return f"{found}, {unknown} are not verified" if unknown else found
    if result.all_converged:
        return f"all {k} eigenpairs converged"
    return (
        f"not converged: {k - done} of {k} eigenpairs, after {result.num_matvecs} products; "
        "raise --max-matvecs or --tol"
    )
