"""What products give back stays with the process, and is used again.

XLA:CPU takes a program's temporary buffer anew for each execution. glibc maps a block of that size
by itself and unmaps it when it is freed, so that each product faults in the same pages again,
zeroed by the kernel: a third of the time of a product (docs/performance.md). Within `kept`, the
programs of a solve take large blocks from glibc's heap, which keeps what is free at its end; when
the solve ends, that is given back. All else maps its large blocks as ever, the basis and results
among them: in the heap they would lie between what comes and goes, and raise the peak.

M_MMAP_MAX = 0 rather than a high M_MMAP_THRESHOLD, which is an int, hence below 2 GiB. Only the
heap of the main thread has room for any block: of other threads glibc maps blocks above 64 MiB,
where their heaps end, whatever is set. Hence the programs of a solve run in the thread that calls
them, where XLA would take any of its own (`curvax.program`).

Any such call ends glibc's adjustment of the threshold to what is freed (mallopt(3),
M_MMAP_THRESHOLD) for the life of the process. Hence, where no setting of the user's had ended it
before, the threshold becomes the one that this adjustment may at most come to.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from pathlib import Path
from typing import Any

import jax

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
_KEEPING = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10}
# DEFAULT_MMAP_THRESHOLD_MAX on 64 bits, and the trim threshold that the adjustment sets with it.
_ADJUSTED = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
# mallopt takes an int.
_LARGEST = 2**31 - 1
# Less than this is not worth a walk over all free blocks at the end, which costs milliseconds.
_WORTH_TRIMMING = 16 << 20

_HUGE_PAGE = 2 << 20

# XLA aligns by 64 bytes, a block is at least 32 long, and may be that much longer than asked for.
# The cache of a thread has 7 blocks of each size (tcache_count).
_CUT_OFF, _CACHED = 64 + 32 + 32, 7
_SMALL = range(24, _CUT_OFF, 16)

_log = logging.getLogger("curvax")
# None: what CURVAX_KEEP_MEMORY says.
_wanted: ContextVar[bool | None] = ContextVar("keep_memory", default=None)
_within: ContextVar[Callable[[], "_Use | None"]] = ContextVar("within_kept", default=lambda: None)


@contextlib.contextmanager
def keep_memory(enabled: bool = True) -> Iterator[None]:
    """Within the context, what products on the host free is used again without the system.

    Solves and estimates do so by themselves, which makes their products up to a third faster. The
    context is for several of them, for products `op @ v` in a loop, or, with False, to have none
    of it. What was kept is given back to the system at the end, also after an error. Contexts in
    other threads, and within one another, share it: the last to end gives back.

    It works where memory comes from glibc's malloc (`curvax info` says so), and changes no result.
    In threads other than the main one blocks above 64 MiB are the system's each time. Programs that
    run so are not written to JAX's persistent compilation cache; where there is one, nothing is
    kept that was not asked for. Until the end, the process keeps small blocks that it frees too.
    Afterwards M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD are glibc's defaults, or those of
    `MALLOC_*_` and GLIBC_TUNABLES. One thing cannot be undone: glibc no longer adjusts
    M_MMAP_THRESHOLD to what is freed. If it did until then, it stays at the most that the
    adjustment would come to: 32 MiB, with a trim threshold of 64 MiB.

    Args:
        enabled: False keeps nothing, whatever `CURVAX_KEEP_MEMORY` says: with 0, solves and
            estimates that are not in such a context keep nothing either.

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
    token = None
    try:
        token = _wanted.set(enabled)
        with kept():
            yield
    finally:
        _reset(_wanted, token)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What solves do: as `keep_memory`, if neither that nor the variable says otherwise."""
    if not keeping():
        yield
        return
    use, token = _Use(_heap.solves), None
    try:
        token = _within.set(weakref.ref(use))
        use.begin()
        yield
    finally:
        use.end()
        _reset(_within, token)


@contextlib.contextmanager
def unmapped(nbytes: int = 0) -> Iterator[None]:
    """Around a program: in `kept`, what it takes, large or not, is of the heap.

    Args:
        nbytes: what it takes, for which there are to be huge pages; 0 where that is not known.
    """
    if not within():
        yield
        return
    use = _Use(_heap.programs)
    try:
        use.begin()
        _heap.ask_for_huge_pages(nbytes)
        yield
    finally:
        use.end()


def _reset(variable: ContextVar[Any], token: Token[Any] | None) -> None:
    # A generator may be ended in another context than that in which it began, whose is the value.
    with contextlib.suppress(ValueError):
        if token is not None:
            variable.reset(token)


def keeping() -> bool:
    """Whether solves here do so; what another thread does changes nothing in a solve."""
    wanted = _wanted.get()
    if wanted is None:
        said = _said()
        wanted = not _programs_are_written() if said is None else said
    return wanted and not reason_against()


def within() -> bool:
    """Whether the caller is in such a solve or context."""
    use = _within.get()()
    return use is not None and use.lasts


def kept_or_not() -> str:
    """In words, for a table."""
    reason = reason_against()
    if reason:
        return f"cannot be kept: {reason}"
    if keeping():
        return "kept during solves"
    return "kept within curvax.keep_memory()"


def _said() -> bool | None:
    value = os.environ.get("CURVAX_KEEP_MEMORY", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"CURVAX_KEEP_MEMORY must be 0 or 1, got {value!r}")
    return None if not value else value == "1"


def _programs_are_written() -> bool:
    config: Any = jax.config
    return bool(config.jax_enable_compilation_cache and config.jax_compilation_cache_dir)


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
    """The settings of glibc's malloc, which are the process's, and who needs them.

    Attributes:
        solves: that keep memory.
        programs: that run in them.
    """

    def __init__(self) -> None:
        # One thread may enter it twice: what is collected in the middle ends its use.
        self.lock = threading.RLock()
        self.solves: set[int] = set()
        self.programs: set[int] = set()
        self._before = (0, 0)
        self._on_huge_pages = 0

    def began(self) -> None:
        """The first solve has begun."""
        self._before = _resident(), _end_of_heap()
        self._on_huge_pages = 0
        _set(_otherwise() | _KEEPING)

    def ended(self) -> None:
        """The last solve has ended."""
        _set(_otherwise())
        resident, end = self._before
        if max(_resident() - resident, _end_of_heap() - end) > _WORTH_TRIMMING:
            _libc().malloc_trim(0)

    def program_began(self) -> None:
        """The first program has begun."""
        _set({_MMAP_MAX: 0})

    def ask_for_huge_pages(self, nbytes: int) -> None:
        """Where the next block of that size will lie, before any of its pages is touched.

        512 times fewer page faults, where the system has huge pages for who asks for them.
        """
        main = threading.current_thread() is threading.main_thread()
        with self.lock:
            if nbytes <= self._on_huge_pages or not main:
                return
            self._on_huge_pages = nbytes
            block = None
            try:
                block = _libc().malloc(nbytes)
                if block:
                    first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
                    length = (block + nbytes - first) // _HUGE_PAGE * _HUGE_PAGE
                    _libc().madvise(first, max(length, 0), mmap.MADV_HUGEPAGE)
            finally:
                _libc().free(block)

    def program_ended(self) -> None:
        """The last program has ended."""
        _join_free_blocks()
        _set({_MMAP_MAX: _otherwise()[_MMAP_MAX]})


class _Use:
    """One of those who need the settings, until it ends, or is let go of.

    A KeyboardInterrupt may come anywhere in between, so that all can be done twice.
    """

    lasts = False

    def __init__(self, users: set[int]) -> None:
        self._users = users
        solve = users is _heap.solves
        self._first = _heap.began if solve else _heap.program_began
        self._last = _heap.ended if solve else _heap.program_ended

    def begin(self) -> None:
        with _heap.lock:
            self.lasts = True
            self._users.add(id(self))
            if len(self._users) == 1:
                self._first()

    def end(self) -> None:
        with _heap.lock:
            if not self.lasts:
                return
            self._users.discard(id(self))
            if not self._users:
                self._last()
            self.lasts = False

    def __del__(self) -> None:
        self.end()


_heap = _Heap()


def _otherwise() -> dict[int, int]:
    """The settings where nothing is kept; the first of any of them had ended the adjustment."""
    return _DEFAULTS | (_users_settings() or _ADJUSTED)


def _join_free_blocks() -> None:
    """Have what posix_memalign cut off a block join it again, once that is free.

    It cuts aligned blocks from such as are longer by up to `_CUT_OFF` bytes, and frees the rest
    into the thread's cache of small blocks. A block beside one in the cache is as short ever after,
    and the next that is asked for of that size takes another place, at the end of the heap. So the
    cache is emptied, filled with others, and what was in it comes to the heap's own lists of small
    blocks, whose neighbours the next mallopt joins.
    """
    libc = _libc()
    held = [[libc.malloc(size) for _ in range(2 * _CACHED)] for size in _SMALL]
    for blocks in held:
        for block in reversed(blocks):  # from the cache came the first
            libc.free(block)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    return libc


def _set(options: dict[int, int]) -> None:
    lasting = {option for option, value in _users_settings().items() if value > _LARGEST}
    for option, value in options.items():
        if option not in lasting:  # which could not be set again
            _libc().mallopt(option, value)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _end_of_heap() -> int:
    """The address behind it, as brk(2) set it: also what nobody has touched yet."""
    return int(_libc().sbrk(0))
