"""The host's small dense algebra in one thread of BLAS.

The other threads of OpenBLAS wait for the next call by spinning, for over 60 ms, each on a core of
its own: measured on two cores, an `eigh` of 26 rows (0.1 ms) made the product after it take 125 ms
in place of 81. One thread is as fast up to the sizes that a solve has (400 rows: 16 ms, two 15).
"""

import contextlib
import functools
from collections.abc import Iterator

from threadpoolctl import ThreadpoolController


@functools.cache
def _controller() -> ThreadpoolController:
    """Of the libraries that are loaded: NumPy's is."""
    return ThreadpoolController()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A context in which BLAS has one thread; afterwards as many as before.

    The number is one for the process. Of several Python threads the first that sets it keeps the
    right to, while it lives: the others' contexts change nothing, and so none is left behind.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield
