"""R05, R06, R08, R09 on real sockets: what arrives too large, too slowly or not at all, and clients
that leave or stop reading. Both of uvicorn's parsers, one set of bounds."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmserve.limits import Limits
from support.models import make_model_folder
from support.servers import LocalServer, local_server

pytestmark = pytest.mark.http

Address = tuple[str, int]
SLACK_S = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=["httptools", "h11"])
def address(request: pytest.FixtureRequest, folder: Path) -> Iterator[Address]:
    with local_server(folder) as server, server.listening(request.param) as found:
        yield found
        server.wait_idle()


def exchange(address: Address, data: bytes, *, timeout: float = 10.0) -> bytes:
    """Send bytes and read until the server closes; a reset ends both quietly."""
    with socket.create_connection(address, timeout) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def request(body: bytes, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    lines = [
        b"POST " + path + b" HTTP/1.1",
        b"host: 127.0.0.1",
        b"content-type: application/json",
        b"connection: close",
        *headers,
    ]
    if not any(header.lower().startswith((b"transfer", b"content-length")) for header in headers):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def status_of(reply: bytes) -> int:
    assert reply.startswith(b"HTTP/1.1 "), reply[:100]
    return int(reply[9:12])


def is_well(address: Address) -> bool:
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
    return status_of(exchange(address, request(body))) == 200


def test_a_chunked_request_of_single_bytes_is_served(address: Address) -> None:
    body = json.dumps({"prompt": "x" * 200, "max_tokens": 1}).encode()
    reply = exchange(address, request(chunked(body, 1), b"transfer-encoding: chunked"))
    assert status_of(reply) == 200


def test_a_body_declared_too_large_is_refused_unread(address: Address) -> None:
    reply = exchange(address, request(b"", b"content-length: 100000000"))
    assert status_of(reply) == 413
    assert b'"error"' in reply


@pytest.mark.parametrize("framing", [b"content-length: 50000000", b"transfer-encoding: chunked"])
def test_a_huge_body_costs_no_memory(address: Address, framing: bytes) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    block = b"10000\r\n" + b" " * 65536 + b"\r\n" if b"chunked" in framing else b" " * 65536
    peak = before
    with socket.create_connection(address, 10) as connection:
        try:
            connection.sendall(request(b"", framing))
            for _ in range(50_000_000 // 65536):
                connection.sendall(block)
                peak = max(peak, process.memory_info().rss)
        except ConnectionError:
            pass
        reply = read_all(connection)
    assert not reply or status_of(reply) == 413
    assert peak - before < 16 << 20  # both ends of the socket are in this process
    assert is_well(address)


def test_a_body_just_above_the_limit_gets_its_413(address: Address) -> None:
    body = b'{"prompt":"' + b"x" * Limits().max_body_bytes + b'"}'
    assert status_of(exchange(address, request(body))) == 413
    reply = exchange(address, request(chunked(body, 60_000), b"transfer-encoding: chunked"))
    assert status_of(reply) == 413


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([b"x-%d: 1" % index for index in range(95)], 200),
        ([b"x-%d: 1" % index for index in range(200)], 431),
        ([b"x: " + b"a" * 20_000], 200),
        ([b"x: " + b"a" * 40_000], 431),
        ([b"x-%d: %s" % (index, b"a" * 1000) for index in range(50)], 431),
    ],
    ids=["95 small", "200 small", "20 kB", "40 kB", "50 of 1 kB"],
)
def test_headers_are_bounded_whichever_parser_reads_them(
    address: Address, headers: list[bytes], expected: int
) -> None:
    body = b'{"prompt":"x","max_tokens":1}'
    reply = exchange(address, request(body, *headers))
    assert status_of(reply) == expected


def test_headers_without_end_are_cut_off(address: Address) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    flood = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n" + b"x-a: aaaaaaaa\r\n" * 200_000
    reply = exchange(address, flood)
    assert not reply or status_of(reply) == 431
    one_line = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"a" * 5_000_000
    reply = exchange(address, one_line)
    assert not reply or status_of(reply) == 431
    assert process.memory_info().rss - before < 16 << 20
    assert is_well(address)


def test_trailers_do_not_become_headers(address: Address) -> None:
    body = b'{"prompt":"x","max_tokens":1}'
    data = chunked(body, 10)[:-2] + b"host: evil.example\r\nx-request-id: from-trailer\r\n\r\n"
    reply = exchange(address, request(data, b"transfer-encoding: chunked"))
    assert status_of(reply) == 200
    assert b"from-trailer" not in reply


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nbad header\r\n\r\n",
        request(b"{}", b"content-length: -1"),
        request(b"{}", b"content-length: 2", b"content-length: 3"),
        request(b"{}", b"content-length: 2", b"transfer-encoding: chunked"),
        request(b"zz\r\n{}", b"transfer-encoding: chunked"),
    ],
    ids=[
        "garbage", "path bytes", "path escapes", "header", "negative length",
        "two lengths", "length and chunked", "chunk size",
    ],
)  # fmt: skip
def test_malformed_http_is_refused(address: Address, data: bytes) -> None:
    reply = exchange(address, data)
    assert not reply or 400 <= status_of(reply) < 500
    assert is_well(address)


def test_kept_connections_take_one_request_after_another(address: Address) -> None:
    body = b'{"prompt":"x","max_tokens":1}'
    data = request(body).replace(b"connection: close\r\n", b"")
    with socket.create_connection(address, 10) as connection:
        for _ in range(3):
            connection.sendall(data[:60])
            connection.sendall(data[60:])
            reply = b""
            while not reply.endswith(b"}}}"):
                reply += connection.recv(65536)
            assert status_of(reply) == 200
        connection.sendall(data + data)  # pipelined
        received = b""
        while received.count(b"HTTP/1.1 200") < 2:
            received += connection.recv(65536)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def impatient(
    request: pytest.FixtureRequest, folder: Path
) -> Iterator[tuple[LocalServer, Address]]:
    """A server whose deadlines are short."""
    limits = Limits(
        header_timeout_s=0.4, request_timeout_s=0.8, keep_alive_s=1, write_stall_s=0.5,
        max_connections=60,
    )  # fmt: skip
    with (
        local_server(folder, limits=limits, step_s=0.002) as server,
        server.listening(request.param) as address,
    ):
        yield server, address


def test_slow_senders_are_cut_off_in_time_and_others_served(
    impatient: tuple[LocalServer, Address],
) -> None:
    _, address = impatient
    whole = request(b'{"prompt":"x","max_tokens":1}')
    starts = {"idle": b"", "half header": whole[:40], "half body": whole[:-5]}
    started = time.monotonic()
    held = [(kind, socket.create_connection(address, 5)) for kind in starts for _ in range(15)]
    for kind, connection in held:
        connection.sendall(starts[kind])
    assert is_well(address)
    for kind, connection in held:
        reply = read_all(connection)
        connection.close()
        assert time.monotonic() - started < 0.8 + SLACK_S
        assert reply == b"" if kind == "idle" else status_of(reply) == 408
    assert is_well(address)


def test_a_trickle_does_not_extend_the_deadline(impatient: tuple[LocalServer, Address]) -> None:
    _, address = impatient
    whole = request(b'{"prompt":"x","max_tokens":1}')
    with socket.create_connection(address, 5) as connection:
        started = time.monotonic()
        try:
            for index in range(len(whole)):
                connection.sendall(whole[index : index + 1])
                time.sleep(0.02)
        except ConnectionError:
            pass
        assert time.monotonic() - started < 0.8 + SLACK_S


def test_connections_are_bounded(impatient: tuple[LocalServer, Address]) -> None:
    _, address = impatient
    held = [socket.create_connection(address, 5) for _ in range(60)]
    try:
        time.sleep(0.05)
        assert status_of(exchange(address, b"")) == 503
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if is_well(address):
                return
        except AssertionError:
            time.sleep(0.02)
    pytest.fail("the server did not recover")


def test_a_reader_that_stops_is_aborted_and_a_neighbour_goes_on(
    impatient: tuple[LocalServer, Address],
) -> None:
    server, address = impatient
    body = {"prompt": [[5]] * 4, "n": 16, "max_tokens": 240, "stream": True, "ignore_eos": True}
    data = request(json.dumps({**body, "logprobs": 20}).encode())
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(data)
        assert connection.recv(100)
        neighbour = exchange(address, request(b'{"prompt":"x","max_tokens":50}'))
        assert status_of(neighbour) == 200
        server.wait_idle()
        connection.settimeout(5)
        time.sleep(0.6)
        assert b"[DONE]" not in read_all(connection)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_clients_that_leave_free_everything(
    impatient: tuple[LocalServer, Address], stream: bool
) -> None:
    server, address = impatient
    body = {"prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": stream, "n": 2}
    before = server.service.metrics._ended["abort"]
    for index in range(20):
        with socket.create_connection(address, 5) as connection:
            connection.sendall(request(json.dumps(body).encode()))
            threading.Event().wait(0.001 * index)
    deadline = time.monotonic() + 1.0 + SLACK_S
    while not server.engine.requests.is_idle:
        assert time.monotonic() < deadline, "requests outlive their clients"
        time.sleep(0.01)
    server.wait_idle()
    assert server.service.metrics._ended["abort"] > before
    assert is_well(address)
