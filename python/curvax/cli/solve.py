"""A solve with a progress display; its warnings become notes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from rich.console import Console

from curvax.cli.display import show_progress

if TYPE_CHECKING:
    from curvax.results import EigenResult


def solve(
    console: Console,
    op: Any,
    k: int | tuple[int, int],
    quiet: bool,
    max_matvecs: int | None,
    options: dict[str, Any],
) -> EigenResult:
    """Run `eigsh(op, k, max_matvecs=..., **options)`.

    Args:
        console: for the notes.
        op: the operator.
        k: see `eigsh`.
        quiet: show no progress.
        max_matvecs: see `eigsh`.
        options: the other arguments.
    """
    import curvax as cx

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        phase, budgeted = "compiling the Hessian-vector product", max_matvecs is not None
        with show_progress(quiet, phase, budgeted) as display:
            result = cx.eigsh(op, k, max_matvecs=max_matvecs, callback=display.update, **options)
    # What a ConvergenceWarning says stands below the table.
    notes = [w.message for w in caught if not issubclass(w.category, cx.ConvergenceWarning)]
    for note in dict.fromkeys(map(str, notes)):
        console.print(f"note: {note}", style="yellow")
    return result
