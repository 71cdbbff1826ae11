"""What products give back stays with the process, where that is asked for.

XLA:CPU takes a program's temporary buffer anew for each execution. glibc maps a block of that size
by itself and unmaps it when it is freed, so that each product faults in the same pages again,
zeroed by the kernel: a third of the time of a product (docs/performance.md). Within `kept` glibc
takes large blocks from its heap and leaves free memory at the heap's end; at the end the heap is
given back.

M_MMAP_MAX = 0 rather than a high M_MMAP_THRESHOLD, which is an int, hence below 2 GiB. XLA takes
results in the thread that calls it and temporary memory in one of its own; of threads other than
the main one glibc maps blocks above 64 MiB, where their heaps end, whatever is set. Hence programs
that are compiled then have their temporary memory in smaller blocks; see `curvax.program`. What
stays is single temporary arrays above 64 MiB. Each of XLA's threads keeps its own, which is why
nothing is kept that nobody asked for.

Any such call ends glibc's adjustment of the threshold to what is freed (mallopt(3),
M_MMAP_THRESHOLD) for the life of the process. Hence, where no setting of the user's had ended it
before, the threshold becomes the one that this adjustment may at most come to.
"""

import contextlib
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

# <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
# The name of each in GLIBC_TUNABLES, and, in capitals, in a variable of its own.
_NAMES = {
    "trim_threshold": _TRIM_THRESHOLD,
    "top_pad": _TOP_PAD,
    "mmap_threshold": _MMAP_THRESHOLD,
    "mmap_max": _MMAP_MAX,
}
_TUNABLES = "glibc.malloc."
# Growth in large steps: fewer calls of the system.
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10}
# DEFAULT_MMAP_THRESHOLD_MAX on 64 bits, and the trim threshold that the adjustment sets with it.
_ADJUSTED = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
# mallopt takes an int.
_LARGEST = 2**31 - 1
# Less than this is not worth a walk over all free blocks at the end, which costs milliseconds.
_WORTH_TRIMMING = 16 << 20

_log = logging.getLogger("curvax")
# None: what CURVAX_KEEP_MEMORY says.
_wanted: ContextVar[bool | None] = ContextVar("keep_memory", default=None)


@contextlib.contextmanager
def keep_memory(enabled: bool = True) -> Iterator[None]:
    """Within the context, what computations on the host free is used again without the system.

    Products are up to a third faster, and solves need more memory: each of XLA's threads, as many
    as there are cores, keeps the temporary memory that it once had. Around several solves, or
    products `op @ v` in a loop. What was kept is given back to the system at the end, also after an
    error. Contexts in other threads, and within one another, share it: the last to end gives back.

    It works where memory comes from glibc's malloc (`curvax info` says so), and changes no result.
    Single temporary arrays above 64 MiB are the system's each time, and in threads other than the
    main one vectors of that size too. Until the end, the whole process keeps what it frees.
    Afterwards M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD are glibc's defaults, or those of
    `MALLOC_*_` and GLIBC_TUNABLES. One thing cannot be undone: glibc no longer adjusts
    M_MMAP_THRESHOLD to what is freed. If it did until then, it stays at the most that the
    adjustment would come to: 32 MiB, with a trim threshold of 64 MiB.

    Args:
        enabled: False asks for nothing, as is the default, whatever `CURVAX_KEEP_MEMORY` says: with
            1, every solve and estimate asks that is not in such a context.

    Raises:
        TypeError: ``enabled`` is not a bool.

    Example:
        >>> import jax.numpy as jnp
        >>> import curvax as cx
        >>> def loss(params, batch):
        ...     return jnp.sum((batch @ params) ** 4)
        >>> with cx.keep_memory():
        ...     for scale in (1.0, 2.0):
        ...         op = cx.hessian(loss, scale * jnp.ones(3), jnp.eye(3))
        ...         print(cx.eigsh(op, 1).eigenvalues)
        [12.]
        [48.]
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    token = _wanted.set(enabled)
    try:
        with kept():
            yield
    finally:
        _wanted.reset(token)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What solves do: as `keep_memory`, if that or the variable says so."""
    if not keeping():
        yield
        return
    _heap.enter()
    try:
        yield
    finally:
        _heap.leave()


def keeping() -> bool:
    """Whether computations here ask for it; what another thread does changes nothing in a solve."""
    wanted = _wanted.get()
    return (_said() if wanted is None else wanted) and not reason_against()


def kept_or_not() -> str:
    """In words, for a table."""
    reason = reason_against()
    if reason:
        return f"cannot be kept: {reason}"
    return "kept during solves" if _said() else "kept within curvax.keep_memory()"


def _said() -> bool:
    value = os.environ.get("CURVAX_KEEP_MEMORY", "0")
    if value not in ("0", "1"):
        raise ValueError(f"CURVAX_KEEP_MEMORY must be 0 or 1, got {value!r}")
    return value == "1"


@functools.cache
def reason_against() -> str:
    """Why memory is not kept in this process; empty if it is."""
    found = _other_allocator()
    if found:
        _log.info("memory that products free cannot be kept: %s", found)
    return found


class _Symbol(ctypes.Structure):
    """Dl_info of <dlfcn.h>."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _other_allocator() -> str:
    process = ctypes.CDLL(None)
    if not all(hasattr(process, name) for name in ("gnu_get_libc_version", "mallopt", "dladdr")):
        return "the C library is not glibc"
    files = []
    for function in (process.malloc, process.gnu_get_libc_version):
        symbol = _Symbol()
        process.dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(symbol))
        files.append(os.fsdecode(symbol.file or b"an unknown file"))
    return "" if files[0] == files[1] else f"malloc is that of {files[0]}"


@functools.cache
def _users_settings() -> dict[int, int]:
    """What MALLOC_*_ and GLIBC_TUNABLES, which goes first, said when the process began."""
    entries = (entry.partition("=") for entry in _environment().split("\0"))
    variables = {name: value for name, _, value in entries}
    found = {}
    for name, option in _NAMES.items():
        found[option] = variables.get(f"MALLOC_{name.upper()}_", "")
    for entry in variables.get("GLIBC_TUNABLES", "").split(":"):
        name, _, value = entry.partition("=")
        if name.startswith(_TUNABLES) and name.removeprefix(_TUNABLES) in _NAMES:
            found[_NAMES[name.removeprefix(_TUNABLES)]] = value
    return {option: int(text, 0) for option, text in found.items() if _is_number(text)}


def _environment() -> str:
    return Path("/proc/self/environ").read_text(errors="surrogateescape")


def _is_number(text: str) -> bool:
    try:
        return int(text, 0) >= 0
    except ValueError:
        return False


class _Heap:
    """The settings of glibc's malloc, which are the process's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = (0, 0)

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = _resident(), _end_of_heap()
                _set(_KEEPING)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            own = _users_settings()
            # The first of any of the four settings had ended the adjustment.
            _set(_DEFAULTS | (own or _ADJUSTED))
            resident, end = self._before
            if max(_resident() - resident, _end_of_heap() - end) > _WORTH_TRIMMING:
                ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


_heap = _Heap()


def _set(options: dict[int, int]) -> None:
    lasting = {option for option, value in _users_settings().items() if value > _LARGEST}
    for option, value in options.items():
        if option not in lasting:  # which could not be set again
            ctypes.CDLL(None).mallopt(option, value)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _end_of_heap() -> int:
    """The address behind it, as brk(2) set it: also what nobody has touched yet."""
    sbrk = ctypes.CDLL(None).sbrk
    sbrk.restype = ctypes.c_void_p
    return int(sbrk(ctypes.c_ssize_t(0)))
