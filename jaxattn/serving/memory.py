"""Memory that is free goes back to the system: where glibc would keep it, and what only starting needed."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

LARGE = 1 << 20  # bytes from which a block is mapped by itself, and unmapped when it is free
USUAL = 16 << 20  # the same while serving: what comes and goes with every piece of a prompt stays
ARENAS = 2  # heaps of all threads together
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_MADV_DONTNEED = 4  # sys/mman.h
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r-[x-]p \S+ \S+ \S+ +/.*\n((?:[A-Z]\w+:.*\n)*)", re.MULTILINE)
_CHANGED = re.compile(r"^(?:Anonymous|Private_Dirty|Private_Hugetlb|Swap): +[1-9]", re.MULTILINE)


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


def settle() -> None:
    """Before serving: `give_back`; blocks of the usual size stay from now on."""
    give_back()
    if libc := _libc():
        libc.mallopt(_M_MMAP_THRESHOLD, USUAL)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * USUAL)


def give_back() -> None:
    """Return what is free, and pages of program files that have done their work."""
    gc.collect()
    if libc := _libc():
        libc.malloc_trim(0)
        _forget_pages(libc)


def _forget_pages(libc: ctypes.CDLL) -> None:
    """Pages of program files that nothing has changed leave this process; those that still run come back by themselves.

    Compilers are most of them, and what was imported to read a checkpoint.
    """
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return  # no Linux
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in unchanged(text):
        libc.madvise(start, end - start, _MADV_DONTNEED)


def unchanged(smaps: str) -> list[tuple[int, int]]:
    """Addresses of the mappings of files whose every page is as in the file, and cannot be written."""
    found = _MAPPING.findall(smaps)
    return [(int(start, 16), int(end, 16)) for start, end, facts in found if not _CHANGED.search(facts)]
