"""Which parts of the memory that engines share are in use."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["SharedRanges"]


class SharedRanges:
    """Ranges of bytes, taken and given back; first fit."""

    def __init__(self, num_bytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []

    def take(self, size: int) -> int | None:
        """First byte of `size` bytes that nobody has; None: there are none on end. O(ranges)."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                left = [(start + size, stop)] if stop - start > size else []
                self._free[index : index + 1] = left
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        """Nobody reads or writes these bytes any more. O(ranges)."""
        stop = start + size
        index = bisect_left(self._free, (start, stop))
        assert index == len(self._free) or stop <= self._free[index][0], "bytes given back twice"
        assert index == 0 or self._free[index - 1][1] <= start, "bytes given back twice"
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, stop))
