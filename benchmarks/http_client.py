"""HTTP/1.1 requests over connections that are kept, each piece of a reply stamped as it arrives.

Sits between the event loop's sockets and `client.py`. The stamp is taken when bytes leave the
socket, before anything is parsed. A reader is called back with each piece instead of being woken
as a task, because waking costs more than parsing does.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Protocol, cast
from urllib.parse import urlsplit

from .http_parser import HttpError, ResponseParser

__all__ = ["CONNECT_TIMEOUT_S", "HttpClient", "HttpError", "Reader", "Want"]

CONNECT_TIMEOUT_S = 10.0
BUFFER_BYTES = 64 << 10
# Below uvicorn's 5 s, so that few requests meet a connection that is being closed.
KEEP_ALIVE_S = 3.0
# What may follow the last event: the end of the body, which lets the connection be used again.
TRAILER_TIMEOUT_S = 1.0

Clock = Callable[[], float]


class Want(Enum):
    """What a reader wants after a piece."""

    MORE = auto()
    NOTHING_MORE = auto()
    """It has all it needs; the reply's end may follow."""
    STOP = auto()
    """It will not read on."""


class Reader(Protocol):
    """Takes the pieces of one reply."""

    def take(self, status: int, piece: bytes, now: float) -> Want:
        """One piece of the body, which arrived at `now`."""

    def end(self, status: int) -> None:
        """The reply ended; its body may have been empty."""


class HttpClient:
    """Connections to one server. Used within one event loop; `close` ends those kept."""

    def __init__(self, base_url: str, *, clock: Clock = time.perf_counter) -> None:
        """`base_url`: scheme, host, port and perhaps the beginning of every path."""
        parts = urlsplit(base_url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._netloc = parts.netloc
        self._path = parts.path.rstrip("/")
        self._clock = clock
        self._idle: deque[_Connection] = deque()

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """The head of a request, up to its body's length: what `request` takes."""
        fields = {
            "Host": self._netloc,
            "User-Agent": "llmserve-bench",
            "Accept-Encoding": "identity",  # a packed stream arrives in lumps
            "Content-Type": "application/json",
        }
        given = {name.lower() for name in headers}
        kept = {name: value for name, value in fields.items() if name.lower() not in given}
        lines = [f"{method} {self._path}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (kept | dict(headers)).items()]
        return "\r\n".join([*lines, "Content-Length: "]).encode()

    async def request(self, head: bytes, body: bytes, reader: Reader) -> None:
        """Send a request and give its reply to `reader`, to the end or as far as it wants.

        A server may close a kept connection just as a request is sent on it. Nothing of a reply has
        come then, so the request is sent once more, on a new connection (RFC 9112, 9.3.1).

        Raises:
            OSError: no connection, or it broke.
            HttpError: the reply is not HTTP/1.1.
        """
        request = b"%b%d\r\n\r\n%b" % (head, len(body), body)
        if (kept := self._take_kept()) is not None:
            try:
                return await self._exchange(kept, request, reader)
            except OSError:
                if kept.has_answered:
                    raise
        await self._exchange(await self._connect(), request, reader)

    async def _exchange(self, connection: _Connection, request: bytes, reader: Reader) -> None:
        try:
            await connection.exchange(request, reader)
        finally:
            if connection.is_idle:
                connection.idle_since_s = time.monotonic()
                self._idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            self._idle.pop().close()

    def _take_kept(self) -> _Connection | None:
        """The connection used last, as the others may soon be closed; None: there is none."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_idle and time.monotonic() - connection.idle_since_s < KEEP_ALIVE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._clock), self._host, self._port, ssl=self._tls
                )
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
        return connection


class _Connection(asyncio.BufferedProtocol):
    """One connection, with at most one request under way.

    It reads into a buffer of its own: asyncio's other protocol allocates 256 KiB for each read,
    which for a chunk of one token costs three times what reading it does.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._reader: Reader | None = None
        self._done: asyncio.Future[None] | None = None
        self._is_satisfied = False
        self.is_idle = True
        """Whether it can carry a request."""
        self.has_answered = False
        """Whether bytes have come since the last request was sent."""
        self.idle_since_s = 0.0

    async def exchange(self, request: bytes, reader: Reader) -> None:
        """Send `request`, give the reply to `reader`; see `HttpClient.request`."""
        assert self._transport is not None
        self.is_idle = self.has_answered = self._is_satisfied = False
        self._parser, self._reader = ResponseParser(), reader
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self._transport.write(request)
        await self._done

    def close(self) -> None:
        """Drop it, with whatever is under way."""
        self.is_idle, self._reader = False, None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of `asyncio.BufferedProtocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Of `asyncio.BufferedProtocol`: where the next bytes go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Of `asyncio.BufferedProtocol`: stamp, parse, hand on."""
        now, reader, parser = self._clock(), self._reader, self._parser
        self.has_answered = True
        if reader is None:
            self.close()  # nothing was asked
            return
        try:
            for piece in parser.feed(bytes(self._buffer[:nbytes])):
                if self._is_satisfied:
                    continue
                want = reader.take(parser.status, piece, now)
                if want is Want.STOP:
                    self._finish(None)
                    return
                if want is Want.NOTHING_MORE:
                    self._wait_for_trailer()
        except HttpError as error:
            self._finish(error)
            return
        if parser.is_complete:
            self.is_idle = parser.is_reusable
            self._end(reader)

    def connection_lost(self, exc: Exception | None) -> None:
        """Of `asyncio.BufferedProtocol`: what was under way ends here."""
        self.is_idle, reader = False, self._reader
        if reader is None:
            return
        if exc is not None:
            self._finish(exc)
        elif (cut := self._parser.end()) is not None:
            self._finish(ConnectionError(cut))
        else:
            self._end(reader)

    def _wait_for_trailer(self) -> None:
        self._is_satisfied = True
        loop = asyncio.get_running_loop()
        loop.call_later(TRAILER_TIMEOUT_S, self._give_up_on_trailer, self._done)

    def _give_up_on_trailer(self, done: asyncio.Future[None] | None) -> None:
        if done is not None and not done.done():
            self._finish(None)

    def _end(self, reader: Reader) -> None:
        reader.end(self._parser.status)
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        """End the exchange, once; an error after the reader had all is none."""
        self._reader = None
        if self._done is None or self._done.done():
            return
        if error is None or self._is_satisfied:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)
