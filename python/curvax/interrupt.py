"""Ctrl-C during a solve: noticed between blocks, so that nothing found so far is lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from curvax.warnings import InterruptWarning, warn


class InterruptFlag:
    """Within the context the first SIGINT sets the flag; a second one raises KeyboardInterrupt.

    An interrupt that fell between the donation of the basis and its return would lose it. Outside
    the main thread, where Python delivers no signals, the flag stays unset. Whoever called is told
    at the end, by an `InterruptWarning`: a loop would otherwise go on. Of nested contexts the
    outermost warns, and all are set by what set an inner one.
    """

    def __init__(self, *, warns: bool = True) -> None:
        """Make an unset flag.

        Args:
            warns: whether to warn at the end; not where the program ends anyway.
        """
        self._warns = warns
        self._set = self._raised = False
        self._previous: Any = None

    def __bool__(self) -> bool:
        return self._set

    def __enter__(self) -> "InterruptFlag":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._set:
            self._raised = True
            raise KeyboardInterrupt
        self._set = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if not self._set:
            return
        # Out of a callback on the host, XLA brings an error of its own in place of it.
        if self._raised and isinstance(error, Exception):
            raise KeyboardInterrupt from error
        outer = getattr(self._previous, "__self__", None)
        if isinstance(outer, InterruptFlag):
            outer._set = True
        elif self._warns and error is None:
            warn(
                "interrupted by Ctrl-C: the result holds what was known by then. To end a loop "
                "too, turn this into an error: "
                "warnings.simplefilter('error', curvax.InterruptWarning)",
                InterruptWarning,
            )
