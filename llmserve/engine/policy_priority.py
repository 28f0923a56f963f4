"""By the priority that requests carry."""

from __future__ import annotations

from .policy_fcfs import FcfsPolicy
from .running import SortKey
from .sequence import Sequence

__all__ = ["PriorityPolicy"]


class PriorityPolicy(FcfsPolicy):
    """The lowest `Request.priority` first, in order of arrival among equals.

    A running sequence of higher number is preempted first, but never only to make way: admission
    waits for room.
    """

    def sort_key(self, sequence: Sequence) -> SortKey:
        """Priority, then arrival."""
        return (sequence.request.priority, *super().sort_key(sequence))
