"""Talks to the engine process: the API process's end of the socket pair, on the event loop."""

from __future__ import annotations

import asyncio
import subprocess
from typing import cast

from llmserve.errors import EngineDeadError, EngineError, LLMServeError
from llmserve.limits import Limits

from .engine_handle import EngineHandle
from .engine_launch import EngineLaunch
from .messages import (
    Command,
    Event,
    Failed,
    Ready,
    encode_frame,
    event_decoder,
)

__all__ = ["EngineClient", "EngineStartError", "start_engine"]

STOP_TIMEOUT_S = 5.0
"""Time an engine process gets to end after its connection was closed."""


class EngineStartError(LLMServeError):
    """The engine process could not load what it was told to; the message is its own."""


class EngineClient(EngineHandle):
    """An engine in a process of its own."""

    def __init__(self, ready: Ready, link: _Link, process: subprocess.Popen[bytes], limits: Limits):
        super().__init__(ready, limits=limits)
        self._link = link
        self._process = process
        link.attach(self)

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def send(self, command: Command) -> None:
        """Pass a command on without waiting; dropped when the engine is gone."""
        self._link.send(command)

    async def close(self) -> None:
        """Close the connection, which ends the process; kill it if it does not."""
        self._link.close()
        await _end(self._process)

    def lost(self, error: Exception | None) -> None:
        """The connection ended: so has the process, or it is about to."""
        status = self._process.poll()
        cause = f"exit status {status}" if status is not None else str(error or "connection closed")
        self.lose(f"the engine process ended ({cause})")


class _Link(asyncio.Protocol):
    """The connection: frames in, frames out. Events before `attach` wait for `first_event`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._decoder = event_decoder()
        self._client: EngineClient | None = None
        self.first_event: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

    def attach(self, client: EngineClient) -> None:
        self._client = client
        if self._transport is None:
            client.lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._decoder.feed(data):
                self._take(event)
        except EngineError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(exc)

    def send(self, command: Command) -> None:
        if self._transport is not None:
            self._transport.write(encode_frame(command))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _take(self, event: Event) -> None:
        if self._client is not None:
            self._client.receive(event)
        elif not self.first_event.done():
            self.first_event.set_result(event)

    def _fail(self, error: Exception | None) -> None:
        if self._client is not None:
            self._client.lost(error)
        elif not self.first_event.done():
            self.first_event.set_exception(EngineDeadError("the engine process ended early"))


async def start_engine(launch: EngineLaunch, *, limits: Limits) -> EngineClient:
    """Take over an engine process that was told what to load, and wait until it serves.

    Raises:
        EngineStartError: it said why it cannot, or it ended without a word.
    """
    launch.start()
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(_Link, sock=launch.connection)
    try:
        event = await _first_event(link, launch.process)
    except BaseException:
        link.close()
        raise
    return EngineClient(event, link, launch.process, limits)


async def _first_event(link: _Link, process: subprocess.Popen[bytes]) -> Ready:
    try:
        event = await link.first_event
    except EngineDeadError as error:
        status = await asyncio.to_thread(process.wait)
        raise EngineStartError(f"{error}, with exit status {status}") from error
    if isinstance(event, Failed):
        raise EngineStartError(event.message)
    if not isinstance(event, Ready):
        raise EngineStartError("the engine's first message was not that it is ready")
    return event


async def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)
