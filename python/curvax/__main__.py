"""The entry point of `curvax`, light enough to answer Ctrl-C from its first moment on."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End at once, with a line: the answer to Ctrl-C while nothing is known yet.

    An exception is lost, or crashes an extension module, when it falls into an import or into a
    callback of JAX; and an orderly end crashes while XLA compiles on another thread.
    """
    terminal = os.isatty(2) and os.environ.get("TERM") != "dumb"
    # The bar may be there, with its cursor hidden.
    clean = "\r\x1b[2K\x1b[?25h" if terminal else ""
    os.write(2, f"{clean}error: interrupted\n".encode())
    os._exit(128 + number)


def main() -> None:
    """Run the command line as a program of its own, which owns the process."""
    # A shell's background job ignores Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)
    from curvax.cli import app
    from curvax.cli.exits import Status

    try:
        app()
    except SystemExit as end:
        if end.code == Status.INTERRUPTED:
            # A compilation that was interrupted still runs: see `_leave`.
            sys.stdout.flush()
            os._exit(Status.INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
