"""Requests inside the application, counted by the time of their coming.

A model that was swapped out may be closed when everybody who came before the swap has left: any of
them may have read its prompts, and be about to ask its engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator

__all__ = ["Visitors"]


class Visitors:
    """Who is inside, by era; a swap begins an era."""

    def __init__(self) -> None:
        self._era = 0
        self._inside: Counter[int] = Counter()
        self._left = asyncio.Event()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Count one who is inside for the time of the context."""
        era = self._era
        self._inside[era] += 1
        try:
            yield
        finally:
            self._inside[era] -= 1
            if not self._inside[era]:
                del self._inside[era]
                self._left.set()

    def begin_era(self) -> int:
        """From here on visitors are of another era; the number of the one that ended."""
        self._era += 1
        return self._era - 1

    async def wait_left(self, era: int) -> None:
        """Return when all visitors of `era`, and of those before it, have left."""
        while any(one <= era for one in self._inside):
            self._left.clear()
            await self._left.wait()
