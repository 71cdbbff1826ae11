"""How malloc takes a block of memory."""

import ctypes

_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype, _LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_LIBC.free.argtypes = [ctypes.c_void_p]


def mapped(size: int) -> bool:
    """Whether glibc maps a block of this size by itself, and does not take it from its heap."""
    block = _LIBC.malloc(size)
    # IS_MMAPPED, bit 1 of the size that stands before the block.
    found = bool(ctypes.c_size_t.from_address(block - 8).value & 2)
    _LIBC.free(block)
    return found
