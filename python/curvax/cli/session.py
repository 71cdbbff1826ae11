"""One run of a command on a problem: from its options to its files and its exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from curvax.cli.app import Command, app
from curvax.cli.display import open_stdout, print_facts, show_progress
from curvax.cli.exits import Status, failures
from curvax.cli.files import write_config, write_result
from curvax.cli.options import Out, Quiet
from curvax.cli.problem import Problem, problem_of
from curvax.interrupt import InterruptFlag


@dataclasses.dataclass(frozen=True)
class Session:
    """What all steps of a command need.

    Attributes:
        command: its name.
        options: all of them, defaults too.
        problem: what it is asked about.
        out: the directory for its files, or None if it writes none.
        quiet: print nothing but errors.
        console: where results are printed.
    """

    command: str
    options: dict[str, Any]
    problem: Problem
    out: Path | None
    quiet: bool
    console: Console

    def load(self, **facts: str) -> Any:
        """The problem's operator, after its facts, and others, have been printed."""
        if self.out is not None:
            _make_directory(self.out)
        with show_progress(self.quiet, "loading JAX and the model; compiling its loss"):
            op, own = self.problem.load()
        print_facts(self.console, own | facts)
        return op

    @contextlib.contextmanager
    def notes(self, *, known: type[Warning]) -> Iterator[None]:
        """Within the context, warnings become notes below it; not those that the table tells."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
        notes = [w.message for w in caught if not issubclass(w.category, known)]
        for note in dict.fromkeys(map(str, notes)):
            self.console.print(f"note: {note}", style="yellow")

    def finish(
        self, op: Any, result: Any, name: str, title: str, show: Callable[[], None], reached: bool
    ) -> Status:
        """Print and write a result, which an interrupt does not cut short.

        Args:
            op: the operator.
            result: of it.
            name: of the files.
            title: of the picture.
            show: prints the result.
            reached: whether it is what was asked for.
        """
        assert self.out is not None
        with InterruptFlag(warns=False) as late:
            show()
            write_result(self.console, result, self.out / name, title)
            write_config(self.console, self.command, self.options, op, self.out)
        if result.interrupted or late:
            return Status.INTERRUPTED
        return Status.DONE if reached else Status.NOT_CONVERGED


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        obstacle = None if os.access(path, os.W_OK) else "not writable"
    except OSError as error:
        obstacle = error.strerror
    if obstacle:
        message = f"expected a directory to write to, got {str(path)!r} ({obstacle})"
        raise typer.BadParameter(f"{message}; choose another", param_hint="--out")


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """A function's parameters, each with its annotation, by keyword."""
    found = inspect.signature(function, eval_str=True).parameters.values()
    return [p.replace(kind=p.KEYWORD_ONLY) for p in found]


def command(
    problem: Problem | None = None, *, writes: bool = True
) -> Callable[[Callable[..., Status]], Callable[..., Status]]:
    """Make a command of `function(session, **options)`, which returns its exit status.

    It gets the options that describe a problem, then those of the function, then `--out` and
    `--quiet`: typer reads them from the signature.

    Args:
        problem: the one that the command is about, in place of the options that describe one.
        writes: whether the command writes files, into `--out`.
    """

    def decorate(function: Callable[..., Status]) -> Callable[..., Status]:
        name = function.__name__
        described = [] if problem else _parameters(problem_of)
        own = _parameters(function)[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        out = inspect.Parameter("out", keyword, default=Path(f"curvax-{name}"), annotation=Out)
        quiet = inspect.Parameter("quiet", keyword, default=False, annotation=Quiet)
        context = inspect.Parameter("context", keyword, annotation=typer.Context)

        def run(context: typer.Context, quiet: bool, out: Path | None = None, **given: Any) -> None:
            asked = problem or problem_of(**{p.name: given.pop(p.name) for p in described})
            options = {**context.params, "target": asked.target, "parameters": asked.parameters}
            session = Session(name, options, asked, out, quiet, open_stdout(quiet))
            with failures():
                status = function(session, **given)
            raise typer.Exit(status)

        parameters = [context, *described, *own, *([out] if writes else []), quiet]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, help=inspect.getdoc(function), cls=Command)(run)
        return function

    return decorate
