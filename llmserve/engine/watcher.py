"""What an engine tells whoever watches it: everything that goes in, is decided and comes back.

This base class does nothing with it; `step_log.py` writes it down.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..runners.protocol import RunnerInfo, StepResult
from .config import EngineConfig
from .request import FinishReason, Request
from .step import Step

__all__ = ["Watcher", "WatcherGroup"]


class Watcher:
    """Called by the engine, in the order in which things happen."""

    def started(self, info: RunnerInfo, config: EngineConfig, *, overlaps: bool) -> None:
        """The engine exists; `overlaps` says when its runner's results are collected."""

    def added(self, request: Request) -> None:
        """A request was accepted; it is the engine's own object and changes later."""

    def aborted(self, request_id: str, reason: FinishReason) -> None:
        """Somebody asked for the end of a request, live or not."""

    def finished(self, request_id: str, choice_index: int) -> None:
        """A choice met a stop string, live or not."""

    def failed(self, error: str) -> None:
        """The step under way was given up."""

    def stepping(self, now: float) -> None:
        """A step begins at `now`."""

    def scheduled(self, step: Step) -> None:
        """The step's work was decided on; it may be empty."""

    def collected(self, result: StepResult) -> None:
        """The outcome of the last step that was not empty, before it is applied."""


class WatcherGroup(Watcher):
    """Several watchers, told in order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def started(self, info: RunnerInfo, config: EngineConfig, *, overlaps: bool) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.started(info, config, overlaps=overlaps)

    def added(self, request: Request) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.added(request)

    def aborted(self, request_id: str, reason: FinishReason) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.aborted(request_id, reason)

    def finished(self, request_id: str, choice_index: int) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.finished(request_id, choice_index)

    def failed(self, error: str) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.failed(error)

    def stepping(self, now: float) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.stepping(now)

    def scheduled(self, step: Step) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.scheduled(step)

    def collected(self, result: StepResult) -> None:
        """To each."""
        for watcher in self._watchers:
            watcher.collected(result)
