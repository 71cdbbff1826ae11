"""The application: its name, its help, and what it says of a word that it does not know."""

from __future__ import annotations

import difflib
import importlib.metadata
from typing import Annotated, Any

import typer
import typer.core


class Command(typer.core.TyperCommand):
    """A command that names its options where one is unknown, and refuses one that is given twice.

    Of an option given twice all values but the last would be lost.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check which options are given, then read them."""
        try:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
        except Exception as error:
            # An unknown option; typer names those that are spelt alike, if any.
            if not getattr(error, "possibilities", True):
                names = [name for option in self.params for name in option.opts]
                error.possibilities = [n for n in names if n[0] == "-"]  # type: ignore[attr-defined]
            raise
        for option in given:
            repeatable = getattr(option, "is_flag", True) or getattr(option, "multiple", True)
            if not repeatable and given.count(option) > 1:
                raise typer.BadParameter(
                    "given more than once; give it once", param_hint=" / ".join(option.opts)
                )
        return super().parse_args(ctx, args)


class Group(typer.core.TyperGroup):
    """All commands; an unknown one is answered by those spelt alike, or by all of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first argument names."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands) or self.commands
            ctx.fail(f"no command {args[0]!r}; did you mean {' or '.join(near)}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="curvax",
    cls=Group,
    no_args_is_help=True,
    context_settings={"max_content_width": 100},
    # Plain help: the decorated one gives every flag a type.
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    """Curvature of neural-network losses: certified eigenpairs, traces, diagonals, densities."""
