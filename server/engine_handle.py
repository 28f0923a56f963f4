"""What the rest of the server sees of an engine, wherever that engine runs.

`EngineClient` puts a process behind it; tests put an engine of their own process behind it.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import EngineStats
from llmserve.errors import EngineDeadError
from llmserve.limits import Limits
from llmserve.runners.protocol import RunnerInfo

from .live_requests import LiveRequests
from .messages import Command, Event, Failed, Outputs, Ready

__all__ = ["EngineHandle"]

MIN_STALL_S = 10.0
"""An engine with work may be silent for this long before it counts as stuck."""

STALL_FACTOR = 10.0
"""... or for this many times its slowest step so far, where that is longer."""


class EngineHandle(ABC):
    """A running engine: its facts, its live requests, and whether it makes progress."""

    def __init__(self, ready: Ready, *, limits: Limits) -> None:
        self.info: RunnerInfo = ready.info
        self.config: EngineConfig = ready.config
        self.draft_info: RunnerInfo | None = ready.draft_info
        self.stats: EngineStats | None = None
        """After the latest step; None before the first."""
        self.requests = LiveRequests(
            self.send, limits=limits, max_num_seqs=ready.config.max_num_seqs
        )
        self.died = asyncio.Event()
        """Set when the engine is gone; everything in flight has then ended as `error`."""
        self.on_outputs: Callable[[Outputs], None] = lambda _outputs: None
        """Told of every step, before its outputs are passed on."""
        self._cause: str | None = None
        self._last_step = 0.0
        self._slowest_step_s = 0.0

    @abstractmethod
    def send(self, command: Command) -> None:
        """Pass a command on without waiting."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine and what runs it."""

    def receive(self, event: Event) -> None:
        """Take what the engine says."""
        match event:
            case Outputs(outputs=outputs, stats=stats, step_s=step_s):
                self.on_outputs(event)
                self.stats = stats
                self._last_step = time.monotonic()
                self._slowest_step_s = max(self._slowest_step_s, step_s)
                self.requests.deliver(outputs)
            case Failed(message=message):
                self._cause = message
            case Ready():
                raise EngineDeadError("the engine started twice")

    def lose(self, cause: str) -> None:
        """Note that the engine is gone: everything in flight ends. What it said last stands."""
        if self.died.is_set():
            return
        self._cause = self._cause or cause
        self.died.set()
        self.requests.fail_all("the engine stopped working")

    @property
    def cause_of_death(self) -> str | None:
        """Why the engine is gone, for the log."""
        return self._cause if self.died.is_set() else None

    def problem(self, now: float) -> str | None:
        """What is wrong with the engine at `now` (`time.monotonic`), judged by its progress."""
        if self.died.is_set():
            return "the engine stopped working"
        if self.requests.is_idle:
            return None
        silent_s = now - max(self._last_step, self.requests.busy_since)
        if silent_s > max(MIN_STALL_S, STALL_FACTOR * self._slowest_step_s):
            return f"the engine has work and has made no step for {silent_s:.0f} s"
        return None
