"""A library's memory is moved into huge pages: the right regions, and not a bit of them changes."""

from __future__ import annotations

import mmap

import numpy as np

from llmserve.runners.huge_pages import HUGE_PAGE, collapse_into_huge_pages, full_regions

MAP = """\
{first:x}-{last:x} rw-p 00000000 00:00 0{name}
Size:           {size} kB
KernelPageSize:        4 kB
Rss:            {held} kB
VmFlags: rd wr mr mw me ac
"""


def smaps(first: int, num_bytes: int, *, held: float = 1.0, name: str = "") -> str:
    return MAP.format(
        first=first,
        last=first + num_bytes,
        size=num_bytes >> 10,
        held=int(held * num_bytes) >> 10,
        name=name,
    )


def test_whole_huge_pages_of_a_full_region() -> None:
    start = 0x7F0000001000
    (found,) = full_regions(smaps(start, 3 * HUGE_PAGE))
    assert found == (0x7F0000200000, 0x7F0000600000)


def test_regions_that_are_left_as_they_are() -> None:
    start = 0x7F0000000000
    reserved = smaps(start, 4 * HUGE_PAGE, held=0.5)
    named = smaps(start, 4 * HUGE_PAGE, name="                  [heap]")
    small = smaps(start, HUGE_PAGE // 2)
    assert list(full_regions(reserved + named + small)) == []


def test_what_memory_holds_does_not_change() -> None:
    with mmap.mmap(-1, 4 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        values = np.frombuffer(memory, np.uint32)
        values[:] = np.arange(len(values))
        assert collapse_into_huge_pages() >= 0
        assert (values == np.arange(len(values))).all()
        del values
