"""HTTP/1.1 replies from raw bytes, however the network cut them.

Sits between a connection (`http_client.py`) and whatever reads the body. Written here because a
load test reads tens of thousands of small chunks a second: a general client costs several times
what the chunk itself does (docs/decisions/0012-own-http-client.md).

Source: RFC 9112, sections 4 (status line), 6.3 (length of the body) and 7.1 (chunks).
"""

from __future__ import annotations

import re

__all__ = ["HttpError", "ResponseParser"]

MAX_HEAD_BYTES = 64 << 10
MAX_LINE_BYTES = 8 << 10
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: .*)?")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")


class HttpError(ValueError):
    """A reply that is not HTTP/1.1, or one that this client does not read."""


class ResponseParser:
    """Turns the bytes of one reply into pieces of its body. O(bytes) in all."""

    def __init__(self) -> None:
        self.status = 0
        """0 until the head has come."""
        self.headers: dict[bytes, bytes] = {}
        """By lower-case name."""
        self.is_complete = False
        """Whether the body has ended."""
        self.is_reusable = False
        """Whether the connection may carry another reply after this one."""
        self._rest = b""  # bytes of a line or head that has not ended yet
        self._left: int | None = 0  # of the body or chunk; None: up to the connection's end
        self._is_chunked = False
        self._is_in_chunk = False
        self._is_in_trailer = False

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body in `data`.

        Raises:
            HttpError: it is no reply of HTTP/1.1, or bytes follow its end.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not self.status:
            data = self._take_head(data)
            if not data:
                return []
        if self.is_complete:
            raise HttpError(f"bytes follow the end of the reply: {data[:40]!r}")
        return self._take_chunks(data) if self._is_chunked else self._take_plain(data)

    def end(self) -> str | None:
        """Note that the connection ended, which ends a body without a length.

        Returns what was cut off by it; None: nothing.
        """
        if self.status and self._left is None and not self._is_chunked:
            self.is_complete = True
        if self.is_complete:
            return None
        return f"the server closed the connection {'within' if self.status else 'before'} its reply"

    def _take_head(self, data: bytes) -> bytes:
        """Read status and headers; what follows them."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES or not data.startswith(b"HTTP/1."[: len(data)]):
                raise HttpError(f"the reply does not begin like HTTP/1.1: {data[:40]!r}")
            self._rest = data
            return b""
        first, *lines = data[:end].split(b"\r\n")
        match = STATUS_LINE.fullmatch(first)
        if match is None:
            raise HttpError(f"the reply does not begin like HTTP/1.1: {first[:40]!r}")
        status = int(match[2])
        if status < 200:  # an interim reply, as 100; the real one follows
            return self._take_head(data[end + 4 :])
        self.status = status
        for line in lines:
            name, _, value = line.partition(b":")
            self.headers[name.strip().lower()] = value.strip()
        self._begin_body(is_old=match[1] == b"0")
        return data[end + 4 :]

    def _begin_body(self, *, is_old: bool) -> None:
        headers = self.headers
        if (packing := headers.get(b"content-encoding", b"identity")) != b"identity":
            raise HttpError(f"the reply is packed ({packing.decode('latin-1')}), unasked")
        length = headers.get(b"content-length")
        self._is_chunked = headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        if not self._is_chunked:
            if length is not None and not length.isdigit():
                raise HttpError(f"the reply's content-length is {length[:20]!r}")
            self._left = None if length is None else int(length)
        if self.status in (204, 304):
            self._left, self._is_chunked = 0, False
        self.is_complete = not self._is_chunked and self._left == 0
        is_kept = b"close" not in headers.get(b"connection", b"").lower() and not is_old
        self.is_reusable = is_kept and (self._is_chunked or self._left is not None)

    def _take_plain(self, data: bytes) -> list[bytes]:
        if self._left is None:
            return [data]
        if len(data) > self._left:
            raise HttpError(f"bytes follow the end of the reply: {data[self._left :][:40]!r}")
        self._left -= len(data)
        self.is_complete = self._left == 0
        return [data]

    def _take_chunks(self, data: bytes) -> list[bytes]:
        pieces: list[bytes] = []
        place, size = 0, len(data)
        while place < size:
            if self._left:  # within a chunk
                piece = data[place : place + self._left]
                pieces.append(piece)
                place += len(piece)
                self._left -= len(piece)
                continue
            end = data.find(b"\r\n", place)
            if end < 0:
                self._keep(data[place:])
                break
            self._take_line(data[place:end])
            place = end + 2
            if self.is_complete and place < size:
                raise HttpError(f"bytes follow the end of the reply: {data[place:][:40]!r}")
        return pieces

    def _keep(self, rest: bytes) -> None:
        if len(rest) > MAX_LINE_BYTES or (self._is_in_chunk and rest != b"\r"):
            raise HttpError(f"a chunk of the reply does not end where it should: {rest[:40]!r}")
        self._rest = rest

    def _take_line(self, line: bytes) -> None:
        """The end of a chunk, the size of the next, or a line of the trailer."""
        if self._is_in_chunk:
            if line:
                raise HttpError(f"a chunk of the reply does not end where it should: {line[:40]!r}")
            self._is_in_chunk = False
        elif self._is_in_trailer:
            self.is_complete = not line
        else:
            match = CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise HttpError(f"a chunk of the reply has no size: {line[:40]!r}")
            self._left = int(match[1], 16)
            self._is_in_chunk = self._left > 0
            self._is_in_trailer = self._left == 0
