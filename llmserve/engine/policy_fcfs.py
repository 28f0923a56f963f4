"""First come, first served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from .policy import Policy
from .running import SortKey
from .sequence import Sequence

__all__ = ["FcfsPolicy"]


class FcfsPolicy(Policy):
    """In order of arrival; a preempted sequence is before all that came after it."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []

    def sort_key(self, sequence: Sequence) -> SortKey:
        """Arrival, then the order of creation."""
        return (sequence.request.arrival_time, sequence.uid)

    def add(self, sequence: Sequence) -> None:
        """O(log waiting) comparisons."""
        insort(self._waiting, sequence, key=self.sort_key)

    def remove(self, sequence: Sequence) -> None:
        """O(log waiting) comparisons."""
        place = bisect_left(self._waiting, self.sort_key(sequence), key=self.sort_key)
        assert self._waiting[place] is sequence, "a sequence is not where it was queued"
        del self._waiting[place]

    def peek(self) -> Sequence | None:
        """The first."""
        return self._waiting[0] if self._waiting else None

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)
