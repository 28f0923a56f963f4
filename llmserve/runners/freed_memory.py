"""What is freed is kept for the next step, where the C library can be told so.

A step makes large arrays and drops them, layer after layer. glibc gives what is freed back to the
system by default, and gets it again as pages that must be cleared one by one: with a context of
4,000 tokens that took more than half of a small model's step (docs/lab-log.md, 2026-11-25). It
learns otherwise from larger arrays, so the same step took 36 ms or 14, by what came before it.
"""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST_KEPT_BYTES = 512 << 20
_LARGEST_ARRAY_BYTES = 32 << 20
"""The most that glibc takes here; larger arrays come from the system each time."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 512 MiB that it freed. False where malloc is not glibc's."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
    return bool(kept and mallopt(_M_MMAP_THRESHOLD, _LARGEST_ARRAY_BYTES))


def give_back_freed_memory() -> None:
    """Give all that was freed and kept back to the system, before a phase that needs less of it."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    """A function of glibc's malloc; None where malloc is another's."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
