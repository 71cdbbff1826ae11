"""The command `curvax`: `demo`, `spectrum`, `info`, `--version` (the extra `cli`).

Results go to stdout, progress and messages to stderr. JAX is imported by the commands that need
it, not by these modules.
"""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

from curvax.cli.app import app  # first: it says what to install if typer is missing

import typer  # isort: skip

from curvax.cli import demo, info, spectrum  # noqa: F401 (each adds its command)

__all__ = ["app"]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"curvax {importlib.metadata.version('curvax')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Curvature of neural-network losses: certified top eigenpairs of Hessians."""
