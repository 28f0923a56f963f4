"""Who is served next: the waiting queue as an object, one file for each policy.

A policy decides two things: the order of service among running sequences (`sort_key`; the last is
the first to be preempted), and which waiting sequence is to be admitted next (`peek`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from .running import SortKey
from .sequence import Sequence

__all__ = ["Policy"]


class Policy(ABC):
    """The waiting sequences, none of which holds a row or a block."""

    charges = False
    """Whether `charge` must be called with what tenants use."""

    @abstractmethod
    def sort_key(self, sequence: Sequence) -> SortKey:
        """Order of service; smaller goes first, and no two are equal."""

    @abstractmethod
    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, new or preempted."""

    @abstractmethod
    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue: it is admitted, or it ended."""

    @abstractmethod
    def peek(self) -> Sequence | None:
        """The next one to be admitted; the same until something is added, removed or charged."""

    def charge(self, tokens_by_tenant: Mapping[str, float]) -> None:  # noqa: B027 - most need none
        """Note what tenants used in a step."""

    @abstractmethod
    def __iter__(self) -> Iterator[Sequence]:
        """The waiting sequences, in the order of `sort_key`."""

    @abstractmethod
    def __len__(self) -> int:
        """How many wait."""
