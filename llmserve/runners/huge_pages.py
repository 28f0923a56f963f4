"""Memory that a library has filled, moved into huge pages.

A step of a small model reads all weights: thousands of pages of 4 KiB, more than the processor
keeps addresses of. What is ours asks for huge pages when it is reserved; a library's has to be
collapsed once it is there, which Linux does since 6.1. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HUGE_PAGE", "collapse_into_huge_pages", "full_regions"]

_MADV_COLLAPSE = 25
HUGE_PAGE = 2 << 20
"""Bytes, on x86-64 and on Arm with pages of 4 KiB."""
_LEAST_SHARE = 0.9
"""Of a region that is in use: one that was only reserved would become memory."""


def collapse_into_huge_pages() -> int:
    """Move what this process holds in large regions without a name, and return their bytes.

    It takes a second and a half for a gigabyte, once.
    """
    try:
        madvise = ctypes.CDLL(None).madvise
        regions = list(full_regions(Path("/proc/self/smaps").read_text(encoding="utf-8")))
    except (AttributeError, OSError, TypeError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for start, stop in regions:
        if madvise(start, stop - start, _MADV_COLLAPSE) == 0:
            moved += stop - start
    return moved


def full_regions(smaps: str) -> Iterator[tuple[int, int]]:
    """First and last address + 1 of private regions without a name that hold what they reserve, of
    a huge page or more, cut to whole ones."""
    start = stop = 0
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_nameless = len(words) == 5 and words[1] == "rw-p"
            low, _, high = words[0].partition("-")
            start, stop = (int(low, 16), int(high, 16)) if is_nameless else (0, 0)
        elif words[0] == "Rss:" and int(words[1]) << 10 >= _LEAST_SHARE * (stop - start):
            first = -(-start // HUGE_PAGE) * HUGE_PAGE
            last = stop // HUGE_PAGE * HUGE_PAGE
            if last > first:
                yield first, last
