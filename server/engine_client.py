"""One engine process as the API process sees it: commands in, events out, on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import cast

from llmserve.engine.block_map import BlockMap
from llmserve.errors import EngineDeadError, EngineError

from .messages import (
    BlockMaps,
    Computing,
    EngineCommand,
    Event,
    Failed,
    Inspect,
    Outputs,
    Ready,
    encode_frame,
    event_decoder,
)
from .progress import Progress
from .shared_ranges import SharedRanges

__all__ = ["EngineClient", "EngineEndedError"]


_log = logging.getLogger("llmserve.server")


class EngineEndedError(EngineDeadError):
    """An engine process ended before it served; the message is its own where it had one."""


class EngineClient(asyncio.Protocol):
    """An engine process from its first breath to its last."""

    def __init__(self, number: int, progress: Progress) -> None:
        """`number` is unique among a model's engines; `progress` is to be that of this one."""
        loop = asyncio.get_running_loop()
        self.number = number
        self.pid = 0
        """Process id, once it is known."""
        self.ready: asyncio.Future[Ready] = loop.create_future()
        """Its first event; fails with `EngineEndedError` when there is none."""
        self.lost = asyncio.Event()
        """Set when the connection has ended, and all that came over it was received."""
        self.computing: list[str] = []
        """Requests without an output from this engine that it works on at this moment."""
        self.cause: str | None = None
        """Why it failed, in its own words."""
        self.was_killed = False
        """Whether it was ended from here because it made no steps."""
        self.is_stuck = False
        """... though nothing outside had stopped it."""
        self.progress = progress
        self.ranges = SharedRanges(0)
        """Of the memory that it shares with the engines of the same loader."""
        self._ticks = 0
        self._inspection: asyncio.Future[list[BlockMap]] | None = None
        self._transport: asyncio.Transport | None = None
        self._decoder = event_decoder()
        self._take: Callable[[Outputs], None] | None = None

    def deliver_to(self, take: Callable[[Outputs], None]) -> None:
        """Have `take` called with what the engine computes. Before this it is given nothing to."""
        self._take = take

    def send(self, command: EngineCommand) -> None:
        """Pass a command on without waiting; dropped when the engine is gone."""
        if self._transport is not None:
            self._transport.write(encode_frame(command))

    async def block_maps(self) -> list[BlockMap]:
        """Who holds which KV blocks, when the step under way is done.

        Who asks meanwhile gets the same answer: nobody can make the engine busy with questions.

        Raises:
            EngineDeadError: it has ended.
        """
        if self._transport is None:
            raise EngineDeadError("the engine has ended")
        if self._inspection is None or self._inspection.done():
            self._inspection = asyncio.get_running_loop().create_future()
            self.send(Inspect())
        return await asyncio.shield(self._inspection)

    def close(self) -> None:
        """Close the connection, which ends the process when its step is done."""
        if self._transport is not None:
            self._transport.close()

    def kill(self) -> None:
        """End the process now. For one whose connection is open: its id is its own then."""
        if not self.lost.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def kill_if_stuck(self, elapsed_s: float, *, has_work: bool, most_s: float) -> None:
        """Note that time has passed (`tick`); end a process that has work and makes no steps."""
        self.tick(elapsed_s, has_work=has_work, most_s=most_s)
        if self.progress.is_stuck and not self.was_killed:
            _log.warning("engine %d has work and makes no steps: it is replaced", self.pid)
            self.kill_stuck()

    def kill_stuck(self) -> None:
        """End a process that makes no step, noting whether something had stopped it."""
        self.was_killed = True
        self.is_stuck = not _is_stopped(self.pid)
        self.kill()

    def tick(self, elapsed_s: float, *, has_work: bool, most_s: float) -> None:
        """Note for `progress` that time has passed; see there."""
        before = self._ticks
        if has_work:
            self._ticks = _processor_ticks(self.pid)
        is_computing = self._ticks != before
        self.progress.tick(elapsed_s, has_work=has_work, is_computing=is_computing, most_s=most_s)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """From asyncio."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """From asyncio."""
        try:
            for event in self._decoder.feed(data):
                self._receive(event)
        except EngineError as error:  # no engine of ours: it cannot be talked to
            self.cause = str(error)
            self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        """From asyncio: the process has ended, or is about to."""
        self._transport = None
        self.lost.set()
        if self._inspection is not None and not self._inspection.done():
            self._inspection.set_exception(EngineDeadError("the engine has ended"))
            self._inspection.exception()  # seen: whoever asked may have left
        if not self.ready.done():
            self.ready.set_exception(
                EngineEndedError(self.cause or "the engine process ended before it served")
            )
            self.ready.exception()  # seen: nobody may be waiting

    def _receive(self, event: Event) -> None:
        match event:
            case Outputs():
                self.progress.step(event.step_s)
                if self.computing:
                    served = {output.request_id for output in event.outputs}
                    self.computing = [one for one in self.computing if one not in served]
                if self._take is not None:
                    self._take(event)
            case Computing(request_ids=request_ids):
                self.computing = request_ids
            case BlockMaps(maps=maps):
                if self._inspection is not None and not self._inspection.done():
                    self._inspection.set_result(maps)
            case Failed(message=message):
                self.cause = message
            case Ready():
                self.ready.set_result(event)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal, as SIGSTOP does, and not by itself."""
    return _stat(pid)[:1] in (["T"], ["t"])


def _processor_ticks(pid: int) -> int:
    """Processor time of a process so far, in ticks of the system's clock; 0 where nobody tells."""
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on (proc(5)); elsewhere nothing."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return stat.rpartition(")")[2].split()
