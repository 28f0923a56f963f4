"""How often engines may die: as often as they like, if tokens come between."""

from __future__ import annotations

from collections import deque

from llmserve.errors import EngineDeadError

__all__ = ["Restarts"]

MAX_DEATHS = 5
WINDOW_S = 60.0
"""So many deaths within this time, without any progress, are the end."""

FIRST_DELAY_S = 0.1
DELAY_FACTOR = 4.0
"""The first death without progress is answered at once, the second after `FIRST_DELAY_S`, each
further one after a longer time: what ails the machine may pass."""


class Restarts:
    """Deaths since anybody got a token."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    def progress(self) -> None:
        """A token was delivered, or a request ended."""
        self._deaths.clear()

    def death(self, now: float, cause: str) -> None:
        """Note that an engine died that had work, or by itself, or at its start.

        Raises:
            EngineDeadError: it is one too many.
        """
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] <= WINDOW_S:
            raise EngineDeadError(
                f"{MAX_DEATHS} engines ended in {now - self._deaths[0]:.0f} s without a token "
                f"between, the last one: {cause}"
            )

    @property
    def delay_s(self) -> float:
        """Time to wait before the next start."""
        if len(self._deaths) < 2:
            return 0.0
        return FIRST_DELAY_S * DELAY_FACTOR ** (len(self._deaths) - 2)
