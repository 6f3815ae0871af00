"""Memory that is free goes back to the system: where glibc would keep it, after compiling and after loading."""

from __future__ import annotations

import ctypes
import gc

LARGE = 1 << 20  # bytes from which a block is mapped by itself, and unmapped when it is free
ARENAS = 2  # heaps of all threads together
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h


def _libc() -> ctypes.CDLL | None:
    """glibc, where it is."""
    try:
        found = ctypes.CDLL("libc.so.6")
        return found if found.mallopt and found.malloc_trim else None
    except (OSError, AttributeError):
        return None


def bound_heaps() -> None:
    """Before much is allocated: large blocks do not stay, and threads share few heaps."""
    if libc := _libc():
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Return what is free."""
    gc.collect()
    if libc := _libc():
        libc.malloc_trim(0)
