"""What the commands share: the application, exit statuses, and checks of options."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal, NoReturn

try:
    import typer
    from rich.console import Console
except ImportError:
    raise SystemExit("the command line needs an extra: pip install 'curvax[cli]'") from None

NOT_CONVERGED = 3
BAD_INPUT = 2
INTERRUPTED = 130

Certify = Literal["residuals", "complete"]

app = typer.Typer(
    name="curvax",
    help="Curvature of neural-network losses: certified top eigenpairs of Hessians.",
    no_args_is_help=True,
    # Plain help: the decorated one gives every flag a type.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def check_tol(value: float) -> float:
    """A tolerance between 0 and 1, or a refusal."""
    if not (math.isfinite(value) and 0 < value < 1):
        raise typer.BadParameter(f"expected a number between 0 and 1, got {value:g}")
    return value


def make_directory(path: Path) -> None:
    """Make the directory for the files, or refuse it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        obstacle = None if os.access(path, os.W_OK) else "not writable"
    except OSError as error:
        obstacle = error.strerror
    if obstacle:
        message = f"expected a directory to write to, got {str(path)!r} ({obstacle})"
        raise typer.BadParameter(f"{message}; choose another", param_hint="--out")


def fail(message: str, status: int) -> NoReturn:
    """End with a message on stderr."""
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(f"error: {message}")
    raise typer.Exit(status)
