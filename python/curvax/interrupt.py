"""Ctrl-C during a solve: noticed between blocks, so that nothing found so far is lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class InterruptFlag:
    """Within the context the first SIGINT sets the flag; a second one raises as usual.

    An interrupt that fell between the donation of the basis and its return would lose it. Outside
    the main thread, where Python delivers no signals, the flag stays unset.
    """

    def __init__(self) -> None:
        self._set = False
        self._previous: Any = None

    def __bool__(self) -> bool:
        return self._set

    def __enter__(self) -> "InterruptFlag":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._set:
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
