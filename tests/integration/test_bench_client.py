"""The load test's client against servers that behave, misbehave and die."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from llmserve.benchmarks.client import CHAT_ENDPOINT, Client, ServerError, Target
from llmserve.benchmarks.record import RequestRecord
from llmserve.benchmarks.workload import Prompt
from support.scripted_server import Reply, ScriptedServer, well

pytestmark = pytest.mark.http

PROMPT = Prompt(index=4, content=[1, 2, 3], num_tokens=3, output_len=5)


def complete(server: ScriptedServer, **target: Any) -> RequestRecord:
    async def main() -> RequestRecord:
        async with Client(Target(base_url=server.base_url, model="m", **target)) as client:
            return await client.complete(PROMPT)

    return asyncio.run(main())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_completion_is_sent_and_read() -> None:
    with ScriptedServer() as server:
        record = complete(
            server, body={"temperature": 0, "ignore_eos": True}, headers={"Authorization": "k"}
        )
    body, headers = server.requests[0]
    assert body == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "ignore_eos": True,
    }
    assert headers["Authorization"] == "k"
    assert headers["Content-Type"] == "application/json"
    assert record.is_success
    assert record.index == 4
    assert (record.prompt_tokens, record.completion_tokens) == (3, 5)
    assert len(record.chunk_times_s) == 5
    assert "".join(record.texts) == "t0 t1 t2 t3 t4 "


def test_chat_is_sent_and_read() -> None:
    prompt = Prompt(index=0, content="Hello", num_tokens=None, output_len=2)

    async def main(url: str) -> RequestRecord:
        target = Target(base_url=url, model="m", endpoint=CHAT_ENDPOINT, include_usage=False)
        async with Client(target) as client:
            return await client.complete(prompt)

    with ScriptedServer() as server:
        record = asyncio.run(main(server.base_url))
    assert server.bodies[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 2,
        "stream": True,
    }
    assert record.texts == ["t0 ", "t1 "]
    assert record.completion_tokens is None


def test_times_follow_the_servers_pauses() -> None:
    pause_s = 0.02

    async def paced(reply: Reply, body: dict[str, Any]) -> None:
        for index in range(3):
            await asyncio.sleep(pause_s)
            await reply.token("x", "length" if index == 2 else None)
        await reply.end(3, 3)

    with ScriptedServer(paced) as server:
        began_s = time.perf_counter()
        record = complete(server)
        ended_s = time.perf_counter()
    assert record.origin_s == record.sent_s > began_s
    # Only lower bounds hold on a busy machine: a late reader makes the next gap shorter.
    arrivals_s = [time_s - record.sent_s for time_s in record.chunk_times_s]
    assert all(at_s >= (i + 1) * pause_s for i, at_s in enumerate(arrivals_s))
    assert len(arrivals_s) == 3
    assert record.chunk_times_s[-1] < ended_s


def test_one_connection_serves_requests_in_turn() -> None:
    ports = []

    async def note_port(reply: Reply, body: dict[str, Any]) -> None:
        assert reply.request.transport is not None
        ports.append(reply.request.transport.get_extra_info("peername")[1])
        await well(reply, body)

    async def main(url: str) -> None:
        async with Client(Target(base_url=url)) as client:
            for _ in range(3):
                assert (await client.complete(PROMPT)).is_success

    with ScriptedServer(note_port) as server:
        asyncio.run(main(server.base_url))
    assert len(set(ports)) == 1


async def complete_in_turn(url: str, count: int) -> list[RequestRecord]:
    async with Client(Target(base_url=url)) as client:
        return [await client.complete(PROMPT) for _ in range(count)]


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    async def closes_one(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number == 1:
            reply.cut()  # as if it had been closed for having served enough
        await well(reply, body)

    with ScriptedServer(closes_one) as server:
        records = asyncio.run(complete_in_turn(server.base_url, 3))
    assert [record.is_success for record in records] == [True] * 3
    assert len(server.requests) == 4


def test_a_request_is_sent_anew_only_once() -> None:
    async def serves_one(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number:
            reply.cut()
        await well(reply, body)

    with ScriptedServer(serves_one) as server:
        first, second = asyncio.run(complete_in_turn(server.base_url, 2))
    assert first.is_success
    assert second.error_kind == "connection"
    assert len(server.requests) == 3


def test_an_answer_that_has_begun_is_not_asked_for_again() -> None:
    async def breaks_off(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number == 1:
            await reply.token("x")
            reply.cut()
        else:
            await well(reply, body)

    with ScriptedServer(breaks_off) as server:
        first, second = asyncio.run(complete_in_turn(server.base_url, 2))
    assert first.is_success
    assert second.error_kind == "connection"
    assert len(server.requests) == 2


def test_refusal_is_told_with_its_status() -> None:
    async def full(reply: Reply, body: dict[str, Any]) -> None:
        reply.refuse(429, "try later")

    with ScriptedServer(full) as server:
        record = complete(server)
    assert (record.error_kind, record.error) == ("http_429", "HTTP 429: try later")


async def cut_at_once(reply: Reply, body: dict[str, Any]) -> None:
    reply.cut()
    await reply.send(b"")


async def cut_half_way(reply: Reply, body: dict[str, Any]) -> None:
    await reply.token("a")
    await asyncio.sleep(0.01)
    reply.cut()


async def end_half_way(reply: Reply, body: dict[str, Any]) -> None:
    await reply.token("a")


async def page(reply: Reply, body: dict[str, Any]) -> None:
    await reply.send(b"<html>\n<body>It works!</body>\n\n")


async def noise(reply: Reply, body: dict[str, Any]) -> None:
    await reply.send(b"data: \x00\xff\xfe\n\n")


async def endless_line(reply: Reply, body: dict[str, Any]) -> None:
    while True:
        await reply.send(b"x" * (1 << 18))


async def endless_tokens(reply: Reply, body: dict[str, Any]) -> None:
    while True:
        await reply.token("more")


async def error_in_stream(reply: Reply, body: dict[str, Any]) -> None:
    await reply.token("a")
    await reply.event({"error": {"message": "the engine died", "code": 500}})
    await reply.send(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("script", "kind", "chunks"),
    [
        (cut_at_once, "connection", 0),
        (cut_half_way, "connection", 1),
        (end_half_way, "incomplete", 1),
        (page, "garbage", 0),
        (noise, "garbage", 0),
        (endless_line, "garbage", 0),
        (error_in_stream, "server", 1),
    ],
)
def test_bad_server_ends_in_the_record(script: Any, kind: str, chunks: int) -> None:
    with ScriptedServer(script) as server:
        record = complete(server)
    assert record.error_kind == kind
    assert record.error
    assert len(record.chunk_times_s) == chunks


def test_endless_tokens_are_cut_off() -> None:
    with ScriptedServer(endless_tokens) as server:
        record = complete(server)
    assert record.error_kind == "garbage"
    assert "no end in sight" in record.error


@pytest.mark.parametrize("chunks", [0, 1])
def test_server_that_stops_answering_times_out(chunks: int) -> None:
    async def stuck(reply: Reply, body: dict[str, Any]) -> None:
        for _ in range(chunks):
            await reply.token("a")
        await asyncio.sleep(60)

    with ScriptedServer(stuck) as server:
        record = complete(server, request_timeout_s=0.5)
    assert record.error_kind == "timeout"
    assert ("nothing came" if chunks == 0 else "1 chunks came") in record.error


def test_stream_left_open_after_its_end_is_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmserve.benchmarks.http_client.TRAILER_TIMEOUT_S", 0.05)

    async def lingering(reply: Reply, body: dict[str, Any]) -> None:
        await well(reply, body)
        await asyncio.sleep(60)

    with ScriptedServer(lingering) as server:
        assert complete(server).is_success


def test_dead_server_is_a_connection_failure() -> None:
    async def main() -> RequestRecord:
        async with Client(Target(base_url=f"http://127.0.0.1:{free_port()}")) as client:
            with pytest.raises(ServerError, match="cannot reach") as raised:
                await client.models()
            assert raised.value.status is None
            return await client.complete(PROMPT)

    assert asyncio.run(main()).error_kind == "connection"


def test_tokenizer_of_the_server_is_used() -> None:
    async def main(url: str) -> None:
        async with Client(Target(base_url=url)) as client:
            assert await client.tokenize("w4 w20") == [4, 20]
            assert await client.detokenize([4, 20]) == "w4 w20"

    with ScriptedServer(words=True) as server:
        asyncio.run(main(server.base_url))


def test_route_that_is_not_there_is_told_with_its_status() -> None:
    async def main(url: str) -> None:
        async with Client(Target(base_url=url)) as client:
            with pytest.raises(ServerError, match="HTTP 404") as raised:
                await client.tokenize("w4")
            assert raised.value.status == 404

    with ScriptedServer() as server:
        asyncio.run(main(server.base_url))
