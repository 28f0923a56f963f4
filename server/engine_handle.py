"""What the rest of the server sees of a model's engine, wherever that runs and however often it was
replaced meanwhile.

`Supervisor` puts processes behind it; tests put an engine of their own process behind it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from llmserve.engine.block_map import BlockMap
from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import EngineStats
from llmserve.limits import Limits
from llmserve.runners.protocol import RunnerInfo

from .engine_stats import HandoverTotals
from .live_requests import LiveRequests
from .messages import Command, Outputs, Ready

__all__ = ["EngineHandle"]


class EngineHandle(ABC):
    """A running engine: its facts and its live requests."""

    def __init__(self, ready: Ready, *, limits: Limits, num_replicas: int = 1) -> None:
        self.info: RunnerInfo = ready.info
        self.config: EngineConfig = ready.config
        """Of each replica."""
        self.draft_info: RunnerInfo | None = ready.draft_info
        self.stats: EngineStats | None = None
        """After the latest step, over all replicas; None before the first."""
        self.num_restarts = 0
        """Engine processes that were replaced so far."""
        self.handovers: HandoverTotals | None = None
        """KV blocks from engines that only read prompts; None: there are none such."""
        self.requests = LiveRequests(
            self.send, limits=limits, max_num_seqs=num_replicas * ready.config.max_num_seqs
        )
        self.died = asyncio.Event()
        """Set when the engine is gone for good; everything in flight has then ended as `error`."""
        self.on_outputs: Callable[[Outputs], None] = lambda _outputs: None
        """Told of every step, before its outputs are passed on."""
        self._cause: str | None = None

    @abstractmethod
    def send(self, command: Command) -> None:
        """Pass a command on without waiting."""

    @abstractmethod
    async def close(self) -> None:
        """End the engine and what runs it."""

    @abstractmethod
    async def block_maps(self) -> list[list[BlockMap]]:
        """Who holds which KV blocks: of each replica that serves, each of its pools.

        Raises `EngineDeadError` where an engine ended meanwhile.
        """

    @abstractmethod
    def stall(self) -> str | None:
        """What keeps the engine from getting on at this moment, judged by its progress."""

    def follow(self, old: EngineHandle) -> None:
        """Go on counting where `old`, whose place this one takes, left off."""
        self.num_restarts += old.num_restarts
        if self.handovers is not None and old.handovers is not None:
            self.handovers.add(old.handovers)

    def problem(self) -> str | None:
        """What is wrong with the engine, for good or at this moment."""
        return "the engine stopped working" if self.died.is_set() else self.stall()

    def lose(self, cause: str) -> None:
        """Note that the engine is gone for good: everything in flight ends."""
        if self.died.is_set():
            return
        self._cause = cause
        self.died.set()
        self.requests.fail_all("the engine stopped working")

    @property
    def cause_of_death(self) -> str | None:
        """Why the engine is gone, for the log."""
        return self._cause if self.died.is_set() else None
