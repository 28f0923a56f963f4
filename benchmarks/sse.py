"""Server-sent events from raw bytes, however the network cut them.

Sits between the HTTP client's chunks and `record.py`. A chunk may hold half a line or fifty
events; the events that come out are the same for every cut. Written here because the arrival of
each chunk is what the load test measures: nothing may wait for a line to be complete elsewhere.

Source: WHATWG HTML, section 9.2 (parsing an event stream). `id` and `retry` only matter to
clients that reconnect and are skipped, as are comments and unknown fields.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SSEError", "SSEParser", "ServerEvent"]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SSEError(ValueError):
    """A stream that cannot be one: an event that never ends."""


class ServerEvent(NamedTuple):
    """One event: the text of its `data` lines, joined by line feeds."""

    data: bytes
    name: bytes = b"message"
    """The `event` field; `message` where there is none."""


class SSEParser:
    """Turns the chunks of one response into events. O(bytes) in all."""

    def __init__(self, *, max_event_bytes: int = 4 << 20) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()  # the line that has not ended yet
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._name = b""
        self._is_first_line = True
        self._swallow_line_feed = False  # the last chunk ended with CR: its LF may follow

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that `chunk` completes, in order.

        Raises:
            SSEError: one event, or one line, is longer than `max_event_bytes`.
        """
        if not chunk:
            return []
        if (plain := self._plain_events(chunk)) is not None:
            return plain
        if self._swallow_line_feed and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._swallow_line_feed = chunk.endswith(b"\r")
        events = [event for line in self._lines(chunk) if (event := self._take(line))]
        if len(self._rest) + self._data_bytes > self._max_event_bytes:
            raise SSEError(f"an event of more than {self._max_event_bytes} bytes")
        return events

    def _plain_events(self, chunk: bytes) -> list[ServerEvent] | None:
        """The events of a chunk that holds nothing but whole ones of a `data` line each.

        So are nearly all, and they cost a third of what lines do. None: it holds something else.
        """
        is_plain = chunk[:6] == b"data: " and chunk[-2:] == b"\n\n" and b"\r" not in chunk
        if not is_plain or self._rest or self._data or self._name or self._swallow_line_feed:
            return None
        self._is_first_line = False
        parts = chunk[6:-2].split(b"\n\ndata: ")
        if any(b"\n" in part for part in parts):
            return None
        return [ServerEvent(part) for part in parts]

    def _lines(self, chunk: bytes) -> list[bytes]:
        """The lines that end within `chunk`; what follows the last of them is kept."""
        if b"\n" not in chunk and b"\r" not in chunk:
            self._rest += chunk
            return []
        lines = (bytes(self._rest) + chunk).splitlines()
        self._rest.clear()
        if not chunk.endswith((b"\n", b"\r")):
            self._rest += lines.pop()
        return lines

    def _take(self, line: bytes) -> ServerEvent | None:
        if self._is_first_line:
            line = line.removeprefix(BYTE_ORDER_MARK)
            self._is_first_line = False
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value)
        elif name == b"event":
            self._name = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        """End the event at a blank line; one without data is none."""
        data, name = self._data, self._name
        self._data, self._data_bytes, self._name = [], 0, b""
        if not data:
            return None
        return ServerEvent(b"\n".join(data), name or b"message")
