"""How facts and a running solve are shown: on a terminal or in a log (the extra `cli`)."""

from __future__ import annotations

import contextlib
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from curvax.results import Progress as SolveProgress

# Blocks from which the speed of convergence is estimated.
_WINDOW = 16

# Seconds between the lines of a log.
_LINE_INTERVAL = 5.0

# A file has no edge to wrap lines at.
_UNWRAPPED = 1_000_000


def open_stdout(quiet: bool = False) -> Console:
    """The console for results, which wraps lines on a terminal only."""
    console = Console(quiet=quiet, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _UNWRAPPED
    return console


def print_facts(console: Console, facts: dict[str, str]) -> None:
    """Print names and what they stand for, in two columns."""
    indent = max(map(len, facts)) + 2
    width = max(console.width - indent, 20)
    for name, fact in facts.items():
        lines = ("\n" + " " * indent).join(textwrap.wrap(fact, width))
        console.print(Text.assemble((name.ljust(indent), "cyan"), lines), soft_wrap=True)


def seconds_by_part(seconds: Mapping[str, float]) -> str:
    """What a field `seconds` says, in words."""
    parts = ", ".join(f"{part} {spent:.2f}" for part, spent in seconds.items() if part != "total")
    return f"{seconds['total']:.2f} in all: {parts}"


class Display:
    """Shows nothing: the quiet display, and the base of the others."""

    def __init__(self, budgeted: bool) -> None:
        self._budgeted = budgeted
        self._history: list[SolveProgress] = []
        self._past_the_end = False

    def update(self, progress: SolveProgress) -> None:
        """Take note of a block; the callback of `eigsh`."""
        self._history = [*self._history[1 - _WINDOW :], progress]
        at_the_end = progress.residual <= progress.tol or progress.matvecs >= progress.max_matvecs
        self._show(progress, self._describe(progress, at_the_end), at_the_end)
        self._past_the_end = self._past_the_end or at_the_end

    def _describe(self, progress: SolveProgress, at_the_end: bool) -> str:
        counts = f"{progress.matvecs} products  {progress.converged}/{progress.k} pairs  "
        if self._past_the_end:
            # Products beyond the first certificate have no end that could be foreseen.
            return counts + "checking further"
        if at_the_end:
            return counts + "measuring residuals"
        residual = f"{progress.residual:.1e}" if math.isfinite(progress.residual) else "?"
        left = _clock(seconds_left(self._history, self._budgeted))
        return f"{counts}residual {residual}  left {left}"

    def _show(self, progress: SolveProgress, text: str, at_the_end: bool) -> None:
        pass


class _Bar(Display):
    """A spinner, and a bar once the solve has begun."""

    def __init__(self, budgeted: bool, bar: Progress, task: TaskID) -> None:
        super().__init__(budgeted)
        self._bar = bar
        self._task = task
        self._fraction = 0.0

    def _show(self, progress: SolveProgress, text: str, at_the_end: bool) -> None:
        self._fraction = max(self._fraction, _fraction_done(progress, self._budgeted))
        self._bar.update(self._task, description=text, total=1.0, completed=self._fraction)


class _Lines(Display):
    """A line now and then, for logs."""

    def __init__(self, budgeted: bool, console: Console) -> None:
        super().__init__(budgeted)
        self._console = console
        self._printed = -math.inf

    def _show(self, progress: SolveProgress, text: str, at_the_end: bool) -> None:
        now = time.monotonic()
        due = now - self._printed >= _LINE_INTERVAL
        if due or (at_the_end and not self._past_the_end):
            self._printed = now
            self._console.print(text)


@contextlib.contextmanager
def show_progress(quiet: bool, phase: str, budgeted: bool = False) -> Iterator[Display]:
    """Show `phase` on stderr until the first block, then how the solve goes.

    Args:
        quiet: show nothing.
        phase: what happens before the first block.
        budgeted: whether the user set `max_matvecs`; the default is too far away to tell anything.

    Yields:
        An object whose `update` is a callback for `eigsh`.
    """
    console = Console(stderr=True, markup=False, highlight=False)
    if quiet:
        yield Display(budgeted)
    elif console.is_terminal and not console.is_dumb_terminal:
        with _bar(console) as bar:
            yield _Bar(budgeted, bar, bar.add_task(phase, total=None))
    else:
        console.print(phase)
        yield _Lines(budgeted, console)


@contextlib.contextmanager
def show_counts(
    quiet: bool, phase: str, describe: Callable[[Any], str]
) -> Iterator[Callable[[Any], None]]:
    """Show `phase` on stderr until the first block, then how many products have been made.

    Args:
        quiet: show nothing.
        phase: what happens before the first block.
        describe: what to say of a progress, besides its products.

    Yields:
        A callback for `trace`, `diagonal` and `spectral_density`.
    """
    console = Console(stderr=True, markup=False, highlight=False)
    printed = -math.inf

    def text(progress: Any) -> str:
        return f"{progress.matvecs}/{progress.max_matvecs} products  {describe(progress)}".rstrip()

    def line(progress: Any) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _LINE_INTERVAL:
            printed = time.monotonic()
            console.print(text(progress))

    if quiet:
        yield lambda progress: None
    elif console.is_terminal and not console.is_dumb_terminal:
        with _bar(console) as bar:
            task = bar.add_task(phase, total=None)
            yield lambda progress: bar.update(
                task,
                description=text(progress),
                total=progress.max_matvecs,
                completed=progress.matvecs,
            )
    else:
        console.print(phase)
        yield line


def _bar(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None))
    return Progress(*columns, console=console, transient=True, expand=True)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def seconds_left(history: Sequence[SolveProgress], budgeted: bool) -> float | None:
    """Extrapolate the fall of log(residual), and no further than the budget of products.

    Args:
        history: the latest blocks.
        budgeted: whether the user set `max_matvecs`; the default is too far away to tell anything.
    """
    estimates = []
    recent = [p for p in history if math.isfinite(p.residual) and p.residual > 0]
    if len(recent) >= 4 and recent[-1].seconds > recent[0].seconds:
        logs = [math.log(p.residual) for p in recent]
        slope = statistics.linear_regression([p.seconds for p in recent], logs).slope
        if slope < 0:
            estimates.append(max(0.0, (math.log(recent[-1].tol) - logs[-1]) / slope))
    if budgeted and len(history) >= 2:
        first, last = history[0], history[-1]
        pace = (last.seconds - first.seconds) / (last.matvecs - first.matvecs)
        estimates.append(max(0.0, pace * (last.max_matvecs - last.matvecs)))
    return min(estimates, default=None)


def _fraction_done(progress: SolveProgress, budgeted: bool) -> float:
    """How far log(residual) has fallen from 0 to log(tol), or how much of the budget is spent."""
    fallen = math.log(min(progress.residual, 1.0) or progress.tol) / math.log(progress.tol)
    spent = progress.matvecs / progress.max_matvecs if budgeted else 0.0
    return min(1.0, max(fallen, spent))
