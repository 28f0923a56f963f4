"""Deadlines and bounds below HTTP, for both of uvicorn's parsers.

Uvicorn waits for ever for the rest of a request and for a reader who has stopped reading, and
httptools takes headers without end (docs/http-api.md, limits). The mixin here counts what arrives
and watches the clock; it looks at the parser only through `cycle`, the request that uvicorn has
made of it, so that one rule serves both.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from llmserve.errors import ConfigError
from llmserve.limits import Limits

from .error_replies import error_body

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import RequestResponseCycle

__all__ = ["PARSERS", "GuardedProtocol", "protocol_for"]

PARSERS = ("auto", "httptools", "h11")
"""Values of the option `--http-parser`."""

MAX_CHUNKING_OVERHEAD = 8
"""Bytes on the wire for one of a body: one-byte chunks take six."""

REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class _Phase(Enum):
    HEADERS = "headers"
    BODY = "body"
    IDLE = "idle"
    """A whole request has arrived; the reply may be under way."""


class _Uvicorn(Protocol):
    """What the mixin uses of uvicorn's protocol classes."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    cycle: RequestResponseCycle | None
    connections: set[Any]


class GuardedProtocol:
    """Mixin over a uvicorn protocol class: receipt deadlines, byte counts, stalled readers."""

    limits: Limits

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._phase = _Phase.HEADERS
        self._started = self._uvicorn.loop.time()
        self._num_bytes = 0
        self._last_cycle: RequestResponseCycle | None = None
        self._receipt_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)  # type: ignore[misc]
        if len(self._uvicorn.connections) > self.limits.max_connections:
            self._refuse(503, "too many connections are open")
        else:
            self._arm(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        if self._uvicorn.transport.is_closing():
            return
        if self._phase is _Phase.IDLE:
            self._begin()
        self._num_bytes += len(data)
        super().data_received(data)  # type: ignore[misc]
        if not self._uvicorn.transport.is_closing():
            self._note_progress()

    def pause_writing(self) -> None:
        """The client reads more slowly than tokens come: it has a while to catch up."""
        loop = self._uvicorn.loop
        self._write_timer = loop.call_later(self.limits.write_stall_s, self.abort)
        super().pause_writing()  # type: ignore[misc]

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()  # type: ignore[misc]

    def shutdown(self) -> None:
        """The server ends: a request that has not arrived in full is not waited for."""
        if self._phase is _Phase.IDLE:
            super().shutdown()  # type: ignore[misc]
        else:
            self._uvicorn.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's reply to what its parser refuses, in the API's shape."""
        if self._phase is _Phase.HEADERS and self._num_bytes > self.limits.max_header_bytes:
            self._refuse_headers()
        else:
            self._refuse(400, msg)

    @property
    def _uvicorn(self) -> _Uvicorn:
        return cast("_Uvicorn", self)

    def _begin(self) -> None:
        """The first bytes of another request on a kept connection."""
        self._phase = _Phase.HEADERS
        self._started = self._uvicorn.loop.time()
        self._num_bytes = 0
        self._arm(self.limits.header_timeout_s)

    def _note_progress(self) -> None:
        """What the parser has made of the bytes so far."""
        limits, cycle = self.limits, self._uvicorn.cycle
        if cycle is None or cycle is self._last_cycle:
            if self._num_bytes > limits.max_header_bytes:
                self._refuse_headers()
        elif not cycle.more_body:
            self._last_cycle = cycle
            self._phase = _Phase.IDLE
            self._disarm()
        elif self._num_bytes > limits.max_header_bytes + (
            MAX_CHUNKING_OVERHEAD * limits.max_body_bytes
        ):
            self._uvicorn.transport.close()  # its 413 was sent long ago
        elif self._phase is _Phase.HEADERS:
            self._phase = _Phase.BODY
            self._arm(limits.request_timeout_s)

    def _arm(self, seconds: float) -> None:
        """Give the request until `seconds` after its first byte."""
        self._disarm()
        when = self._started + seconds
        self._receipt_timer = self._uvicorn.loop.call_at(when, self._expire)

    def _disarm(self) -> None:
        if self._receipt_timer is not None:
            self._receipt_timer.cancel()
            self._receipt_timer = None

    def _expire(self) -> None:
        if self._num_bytes:
            self._refuse(408, "the request did not arrive in time")
        else:
            self._uvicorn.transport.close()

    def _refuse_headers(self) -> None:
        self._refuse(431, f"the headers are above {self.limits.max_header_bytes} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, unless it has begun to, and close."""
        transport, cycle = self._uvicorn.transport, self._uvicorn.cycle
        is_replying = cycle is not None and cycle.response_started and not cycle.response_complete
        has_replied = cycle is not None and cycle is not self._last_cycle and cycle.response_started
        if not (is_replying or has_replied):
            transport.write(_raw_reply(self.limits, status, message))
        transport.close()

    def abort(self) -> None:
        """Nobody reads, or the server ends: drop what is buffered."""
        self._uvicorn.transport.abort()


def _raw_reply(limits: Limits, status: int, message: str) -> bytes:
    body = error_body(limits, status, message)
    head = (
        f"HTTP/1.1 {status} {REASONS[status]}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


def protocol_for(parser: str, limits: Limits) -> type[asyncio.Protocol]:
    """Uvicorn's protocol class for `parser`, guarded by `limits`.

    Raises `ConfigError` for an unknown parser, or httptools where it is not installed.
    """
    if parser not in PARSERS:
        raise ConfigError(f"http parser must be one of {', '.join(PARSERS)}, got {parser!r}")
    has_httptools = find_spec("httptools") is not None
    if parser == "httptools" and not has_httptools:
        raise ConfigError("the package httptools is not installed: use --http-parser h11")
    base: type[asyncio.Protocol] = H11Protocol
    if has_httptools and parser != "h11":
        base = _without_trailers()
    return type("Guarded" + base.__name__, (GuardedProtocol, base), {"limits": limits})


def _without_trailers() -> type[asyncio.Protocol]:
    """The httptools protocol; as it comes, a chunked body's trailers become headers."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class HttpTools(HttpToolsProtocol):
        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self.headers = []  # what comes now is no longer the request's

    return HttpTools
