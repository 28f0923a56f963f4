"""A server that streams tokens at a known pace and does nothing else, for measuring the client.

Every token is a chunk of its own, written by a call of its own, as a server that generates them
would do. What it sends is rendered beforehand, so that one core of it outruns any client. It knows
only what load generators send: POST with a JSON body, one request at a time on a connection; every
other question is answered with 404.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field

import orjson

__all__ = ["serve_paced"]

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
MAX_STEPS_BEHIND = 4
"""A pace that was missed by more is not made up for."""


@dataclass(slots=True)
class _Stream:
    """One connection and what it is owed."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    num_left: int = 0


def serve_paced(listener: socket.socket, *, tokens_per_s: float) -> None:
    """Serve for ever: `tokens_per_s` over all streams together, one token of each in a step."""
    listener.setblocking(False)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    streams: dict[socket.socket, _Stream] = {}
    token, last, usage = _token(None), _token("length"), _usage
    due_s = time.perf_counter()
    while True:
        running = [stream for stream in streams.values() if stream.num_left]
        wait_s = max(0.0, due_s - time.perf_counter()) if running else None
        for key, _ in selector.select(wait_s):
            _receive(key.fileobj, listener, selector, streams)  # type: ignore[arg-type]
        now_s = time.perf_counter()
        if not running:
            due_s = now_s
        if now_s < due_s:
            continue
        for stream in running:
            stream.num_left -= 1
            _send(stream, token if stream.num_left else last + usage() + b"0\r\n\r\n")
        step_s = len(running) / tokens_per_s
        due_s = max(due_s + step_s, now_s - MAX_STEPS_BEHIND * step_s)


def _receive(
    ready: socket.socket,
    listener: socket.socket,
    selector: selectors.BaseSelector,
    streams: dict[socket.socket, _Stream],
) -> None:
    if ready is listener:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, selectors.EVENT_READ)
        streams[connection] = _Stream(connection)
        return
    stream = streams[ready]
    try:
        data = ready.recv(1 << 16)
    except OSError:
        data = b""
    if not data:
        selector.unregister(ready)
        del streams[ready]
        ready.close()
        stream.num_left = 0
        return
    stream.received += data
    if not stream.received.startswith(b"P"):
        if stream.received.endswith(b"\r\n\r\n"):
            stream.received.clear()
            _send(stream, NOT_FOUND)
        return
    if (count := _asked(stream.received)) is not None:
        stream.received.clear()
        stream.num_left = count
        _send(stream, HEAD)


def _asked(received: bytearray) -> int | None:
    """The tokens that a whole request asks for; None: it is not whole yet."""
    head, end, body = bytes(received).partition(b"\r\n\r\n")
    length = (
        int(head.lower().rpartition(b"content-length:")[2].split(b"\r\n")[0] or 0) if end else 0
    )
    if not end or len(body) < length:
        return None
    count: int = orjson.loads(body)["max_tokens"]
    return count


def _send(stream: _Stream, data: bytes) -> None:
    """Write all of `data`, or give up on a client that takes nothing."""
    view = memoryview(data)
    stream.connection.settimeout(1.0)
    try:
        stream.connection.sendall(view)
    except OSError:
        stream.num_left = 0


def _token(finish_reason: str | None) -> bytes:
    """A chunk of the size that servers send."""
    choice = {"index": 0, "text": " token", "logprobs": None, "finish_reason": finish_reason}
    return _chunk({"choices": [choice], "usage": None})


def _usage() -> bytes:
    return _chunk({"choices": [], "usage": None}) + b"e\r\ndata: [DONE]\n\n\r\n"


def _chunk(more: dict[str, object]) -> bytes:
    head = {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "paced",
        "system_fingerprint": "fp_0123456789ab",
    }
    event = b"data: " + orjson.dumps(head | more) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


if __name__ == "__main__":  # LISTENER RATE [CORE...]: an open socket's descriptor, tokens a second
    if cores := sys.argv[3:]:
        os.sched_setaffinity(0, {int(core) for core in cores})
    serve_paced(socket.socket(fileno=int(sys.argv[1])), tokens_per_s=float(sys.argv[2]))
