from __future__ import annotations

import pytest

from llmserve.benchmarks.http_parser import HttpError, ResponseParser

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = HEAD + b"3\r\nabc\r\nA;x=1\r\n0123456789\r\n0\r\nTrailer: yes\r\n\r\n"
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nhello"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED


def parse(*pieces: bytes) -> tuple[ResponseParser, bytes]:
    parser = ResponseParser()
    return parser, b"".join(b"".join(parser.feed(piece)) for piece in pieces)


@pytest.mark.parametrize(
    ("reply", "status", "body"),
    [(CHUNKED, 200, b"abc0123456789"), (SIZED, 404, b"hello"), (INTERIM, 404, b"hello")],
)
def test_reply_is_the_same_however_it_is_cut(reply: bytes, status: int, body: bytes) -> None:
    cuts = [(reply[:at], reply[at:]) for at in range(1, len(reply))]
    for pieces in [(reply,), *cuts, tuple(reply[i : i + 1] for i in range(len(reply)))]:
        parser, found = parse(*pieces)
        assert (parser.status, found, parser.is_complete) == (status, body, True)
        assert parser.is_reusable
        assert parser.end() is None


def test_body_of_a_chunk_is_given_before_the_chunk_ends() -> None:
    parser, found = parse(HEAD + b"ff\r\nhalf")
    assert (found, parser.is_complete) == (b"half", False)
    assert parser.end() == "the server closed the connection within its reply"


def test_body_without_a_length_ends_with_the_connection() -> None:
    parser, found = parse(b"HTTP/1.0 200 OK\r\n\r\nab", b"cd")
    assert (found, parser.is_complete, parser.is_reusable) == (b"abcd", False, False)
    assert parser.end() is None
    assert parser.is_complete


def test_connection_that_the_server_will_close_is_not_reused() -> None:
    parser, _ = parse(SIZED.replace(b"content-length", b"Connection: close\r\ncontent-length"))
    assert not parser.is_reusable


def test_connection_closed_at_once_is_told() -> None:
    assert ResponseParser().end() == "the server closed the connection before its reply"


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 " + b"2" * (80 << 10),
        b"HTTP/1.1 200 OK\r\ncontent-length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n",
        HEAD + b"-3\r\nabc",
        HEAD + b"0x3\r\nabc",
        HEAD + b"3\r\nabcd\r\n",
        HEAD + b"9" * (9 << 10),
        SIZED + b"more",
        CHUNKED + b"more",
    ],
)
def test_what_is_no_reply_is_refused(reply: bytes) -> None:
    with pytest.raises(HttpError):
        parse(reply)
