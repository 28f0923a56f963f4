"""The loader as the API process sees it: forks engines on demand, says how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections import deque
from typing import cast

from llmserve.errors import EngineDeadError, EngineError

from .engine_client import EngineClient
from .engine_launch import EngineLaunch
from .messages import (
    Ended,
    Failed,
    Fork,
    Forked,
    LoaderEvent,
    LoadGrammars,
    encode_frame,
    loader_event_decoder,
)
from .progress import Progress
from .shared_ranges import SharedRanges

__all__ = ["LoaderClient", "LoaderGoneError"]

LOAD_TIMEOUT_S = 600.0
"""Time that a loader gets for its first engine, after which it counts as stuck."""

FORK_TIMEOUT_S = 5.0
"""Time for each after that: nothing is left to load."""

STATUS_TIMEOUT_S = 1.0
"""Time that the news of an engine's exit status gets after its connection ended."""

STOP_TIMEOUT_S = 5.0
"""Time a process gets to end after its connection was closed."""


class LoaderGoneError(EngineDeadError):
    """The loader has ended; the message is its own where it had one."""


class LoaderClient(asyncio.Protocol):
    """A loader process from its take-over to its end."""

    def __init__(self, launch: EngineLaunch, handover_bytes: int) -> None:
        self.process: subprocess.Popen[bytes] = launch.process
        # Descriptors cannot be sent through asyncio's transport; so all commands go this way.
        self._sender = launch.connection.dup()
        self._transport: asyncio.Transport | None = None
        self._decoder = loader_event_decoder()
        self._forks: deque[asyncio.Future[int]] = deque()
        self._statuses: dict[int, asyncio.Future[int | None]] = {}
        self._cause: str | None = None
        self._timeout_s = LOAD_TIMEOUT_S
        self._ranges = SharedRanges(handover_bytes)
        self.is_gone = False

    @classmethod
    async def take_over(cls, launch: EngineLaunch, *, handover_bytes: int) -> LoaderClient:
        """Take over a loader that was told what to load, and to have engines share that much."""
        client = cls(launch, handover_bytes)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: client, sock=launch.connection)
        return client

    async def fork(self, command: Fork, progress: Progress) -> EngineClient:
        """Start an engine, whose steps `progress` is to note; it has begun, and is not ready yet.

        Raises:
            LoaderGoneError: the loader has ended, or does not answer and was killed.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            forked = self._send(command, theirs)
        engine = EngineClient(command.number, progress)
        engine.ranges = self._ranges
        await asyncio.get_running_loop().create_unix_connection(lambda: engine, sock=ours)
        try:
            engine.pid = await asyncio.wait_for(forked, self._timeout_s)
        except BaseException as error:
            engine.close()
            if isinstance(error, TimeoutError):
                self.process.kill()
                raise LoaderGoneError(
                    f"the loader did not answer in {self._timeout_s:g} s"
                ) from None
            raise
        self._timeout_s = FORK_TIMEOUT_S
        return engine

    def load_grammars(self) -> None:
        """Have later engines inherit what compiles grammars; does not wait."""
        if self.is_gone:
            return
        self._timeout_s = LOAD_TIMEOUT_S  # the next fork comes after it
        with contextlib.suppress(ConnectionError):
            self._sender.sendall(encode_frame(LoadGrammars()))

    async def status_of(self, engine: EngineClient) -> int | None:
        """How an engine ended whose connection has: its exit code or, negative, the signal.

        None when the loader does not know in time, or is gone itself.
        """
        status = self._statuses.get(engine.pid)
        if status is None:
            return None
        await asyncio.wait([status], timeout=STATUS_TIMEOUT_S)
        del self._statuses[engine.pid]
        return status.result() if status.done() else None

    async def end(self, engine: EngineClient) -> None:
        """Close an engine's connection, which ends it when its step is done; kill it if not."""
        engine.close()
        status = self._statuses.get(engine.pid)
        if status is None or self.is_gone:
            return
        await asyncio.wait([status], timeout=STOP_TIMEOUT_S)
        if not status.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Close the connection, which ends the process; kill it if it does not."""
        if self._transport is not None:
            self._transport.close()
        try:
            await asyncio.to_thread(self.process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """From asyncio."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """From asyncio."""
        try:
            for event in self._decoder.feed(data):
                self._receive(event)
        except EngineError as error:  # no loader of ours: it cannot be talked to
            self._cause = str(error)
            self.process.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        """From asyncio: the process has ended, or is about to."""
        self.is_gone = True
        self._transport = None
        self._sender.close()
        for forked in self._forks:
            if not forked.done():
                forked.set_exception(self._gone())
        for status in self._statuses.values():
            if not status.done():
                status.set_result(None)

    def _send(self, command: Fork, theirs: socket.socket) -> asyncio.Future[int]:
        forked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._forks.append(forked)
        if self.is_gone:
            forked.set_exception(self._gone())
        else:
            # A loader that is gone has said why: what it sent is still to be read.
            with contextlib.suppress(ConnectionError):
                socket.send_fds(self._sender, [encode_frame(command)], [theirs.fileno()])
        return forked

    def _receive(self, event: LoaderEvent) -> None:
        match event:
            case Forked(pid=pid):
                self._statuses[pid] = asyncio.get_running_loop().create_future()
                forked = self._forks.popleft()
                if not forked.done():
                    forked.set_result(pid)
            case Ended(pid=pid, status=status):
                self._statuses[pid].set_result(status)
            case Failed(message=message):
                self._cause = message

    def _gone(self) -> LoaderGoneError:
        return LoaderGoneError(self._cause or "the loader ended without a word")
