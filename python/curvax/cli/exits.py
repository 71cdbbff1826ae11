"""How every command ends: its exit statuses, and the line on stderr that says why."""

from __future__ import annotations

import contextlib
import enum
import signal
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console

# What bad input raises, by now in words of ours.
_INPUT_ERRORS = (
    ValueError,
    TypeError,
    ImportError,
    MemoryError,
    OSError,
    KeyError,
    ArithmeticError,
)


class Status(enum.IntEnum):
    """The exit statuses of all commands."""

    DONE = 0
    BAD_INPUT = 2
    NOT_CONVERGED = 3
    # As shells count a program that a signal has ended.
    INTERRUPTED = 128 + signal.SIGINT


def fail(message: str, status: Status) -> NoReturn:
    """End with a message on stderr."""
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(f"error: {message}")
    raise typer.Exit(status)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Within the context, what bad input and Ctrl-C raise ends the command by `fail`."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", Status.INTERRUPTED)
    except _INPUT_ERRORS as error:
        fail(_describe(error), Status.BAD_INPUT)


def _describe(error: BaseException) -> str:
    """A message, with the notes that were added to it; a KeyError's own is but a key."""
    text = f"no {error}" if type(error) is KeyError else str(error) or type(error).__name__
    return "\n".join([text, *getattr(error, "__notes__", [])])
