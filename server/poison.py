"""Which requests an engine's crashes are blamed on, until one of them is convicted.

A crash counts against the requests that had received no token from that engine and were in the step
that died, or had their grammars compiled. After two such crashes a request is a suspect and runs
alone; a third, alone, convicts it. Any new token clears it. Deaths that came from outside count
against nobody (docs/processes.md).
"""

from __future__ import annotations

import signal
from collections.abc import Iterable

__all__ = ["CrashCounts", "is_from_outside"]

SUSPECT_CRASHES = 2
"""Crashes after which a request runs alone."""

_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM})


def is_from_outside(status: int | None) -> bool:
    """Whether an engine's exit status says that something else ended it; None: nobody knows."""
    return status is None or status in _OUTSIDE


class CrashCounts:
    """Crashes by request id; most of the time there are none."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def blame(self, request_ids: Iterable[str], *, alone: str | None) -> str | None:
        """Count a crash against these requests.

        Args:
            request_ids: Of the step that died, without a token from that engine.
            alone: The suspect that ran alone, if one did.

        Returns:
            `alone`, if this convicts it.
        """
        for request_id in request_ids:
            self._counts[request_id] = self._counts.get(request_id, 0) + 1
        if alone is not None and self._counts.get(alone, 0) > SUSPECT_CRASHES:
            del self._counts[alone]
            return alone
        return None

    def is_suspect(self, request_id: str) -> bool:
        """Whether it is to run alone."""
        return self._counts.get(request_id, 0) >= SUSPECT_CRASHES

    def clear(self, request_id: str) -> None:
        """It has got on, or ended."""
        self._counts.pop(request_id, None)
