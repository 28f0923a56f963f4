"""An event loop whose clock jumps over waits: hours of load in milliseconds, the same each time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# A loop that yields without waiting still gets on, as on a real clock.
TURN_S = 1e-5


class _JumpSelector(selectors.DefaultSelector):
    """Instead of waiting, tells how long it was asked to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        assert events or timeout is not None, "nothing is scheduled: the test would wait for ever"
        if not events:
            self.now += max(timeout or 0.0, TURN_S)
        return list(events)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and moves only by what is waited for."""

    def __init__(self) -> None:
        self._jumps = _JumpSelector()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now


def run_virtual(main: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """Run `main(clock)` on a `VirtualLoop`; `clock` is that loop's time in seconds."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main(runner.get_loop().time))
