"""The door of a cluster: what clients get when the servers behind it are lost, at any message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import chain
from typing import Any

import pytest

from llmserve.limits import Limits
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.cluster_front import MAX_TRIES, ClusterFront
from llmserve.server.cluster_replica import ClusterReplica, ClusterRequest
from llmserve.server.cluster_resume import DivergedError, Resumption
from support.servers import LocalServer, Reply, call

COMPLETION = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True, "stream": True}
CHAT = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 12,
    "ignore_eos": True,
    "stream": True,
}
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("completions", {**COMPLETION, "temperature": 0}),
    ("completions", {**COMPLETION, "n": 3, "stream_options": {"include_usage": True}}),
    ("completions", {**COMPLETION, "prompt": ["a dog", "hello"], "echo": True, "stop": ["e"]}),
    ("chat/completions", {**CHAT, "n": 2, "seed": None}),
]


def singly(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Events that were sent together, as messages of their own."""
    events = message.get("body", b"").split(b"\n\n")
    if len(events) < 3:  # the last one ends there, too
        return [message]
    return [{**message, "body": event + b"\n\n"} for event in events[:-1]]


class LostError(Exception):
    """The server is gone."""


class Cluster:
    """A door to one server that is lost after so many events, once for each number."""

    def __init__(self, server: LocalServer, *losses: int, keys: KeyRing | None = None) -> None:
        self.replica = ClusterReplica(server.state)
        self.losses = list(losses)
        self.asked: list[ClusterRequest] = []
        self.front = ClusterFront(
            self.ask, keys=keys or KeyRing(), limits=server.service.limits, lost=(LostError,)
        )
        self._server = server

    async def ask(self, request: ClusterRequest) -> AsyncGenerator[list[Any]]:
        self.asked.append(request)
        left = self.losses.pop(0) if self.losses else None
        async with aclosing(self.replica.answer(request)) as answer:
            async for messages in answer:
                for message in chain.from_iterable(map(singly, messages)):
                    if left == 0:
                        raise LostError
                    left = None if left is None else left - 1
                    yield [message]

    def post(self, path: str, body: object, **headers: str) -> Reply:
        data = json.dumps(body).encode()
        return self._server.run(call(self.front, "POST", path, data, headers))


def texts(reply: Reply) -> dict[int, tuple[str, list[str]]]:
    """Each choice's text and the reasons of its end; the events must have one head."""
    assert reply.status == 200, reply.body
    found: dict[int, tuple[str, list[str]]] = {}
    events = reply.events()
    assert len({(one["id"], one["created"]) for one in events}) == 1
    for one in events:
        for choice in one["choices"]:
            text, reasons = found.get(choice["index"], ("", []))
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            reason = choice["finish_reason"]
            found[choice["index"]] = text + piece, reasons + ([reason] if reason else [])
    return found


@pytest.mark.parametrize(("route", "body"), STREAMS)
def test_a_stream_goes_on_wherever_its_server_was_lost(
    server: LocalServer, route: str, body: dict[str, Any]
) -> None:
    whole = Cluster(server)
    wanted = texts(whole.post(f"/v1/{route}", body))
    seed = json.loads(whole.asked[0].body)["seed"]
    assert all(len(reasons) == 1 for _, reasons in wanted.values())
    for losses in ([0], [1], [2], [5], [9], [3, 7], [7, 3], [4, 4, 4]):
        cluster = Cluster(server, *losses)
        reply = cluster.post(f"/v1/{route}", {**body, "seed": seed})
        assert texts(reply) == wanted, losses
        assert len(cluster.asked) == len(losses) + 1
        assert len([one for one in reply.events() if one["choices"] == []]) == (
            1 if "stream_options" in body else 0
        )
        roles = [
            choice["index"]
            for one in reply.events()
            for choice in one["choices"]
            if "role" in choice.get("delta", {})
        ]
        assert len(roles) == len(set(roles))
    server.wait_idle()


def test_a_request_without_a_seed_gets_one_that_all_servers_see(server: LocalServer) -> None:
    cluster = Cluster(server, 4)
    texts(cluster.post("/v1/completions", COMPLETION))
    first, second = (json.loads(request.body)["seed"] for request in cluster.asked)
    assert first == second is not None


def test_whole_replies_are_asked_for_again_until_too_many_servers_were_lost(
    server: LocalServer,
) -> None:
    body = {**COMPLETION, "stream": False, "seed": 3, "logprobs": 1}
    wanted = Cluster(server).post("/v1/completions", body).json()["choices"]
    for losses in ([0], [1], [1] * (MAX_TRIES - 1)):
        assert Cluster(server, *losses).post("/v1/completions", body).json()["choices"] == wanted
    reply = Cluster(server, *[1] * MAX_TRIES).post("/v1/completions", body)
    assert reply.status == 503
    assert "lost" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("completions", {**COMPLETION, "logprobs": 1}),
        ("messages", {"model": "tiny", **{k: v for k, v in CHAT.items() if k != "ignore_eos"}}),
    ],
)
def test_a_stream_that_cannot_be_resumed_ends_with_an_error(
    server: LocalServer, route: str, body: dict[str, Any]
) -> None:
    cluster = Cluster(server, 4)
    reply = cluster.post(f"/v1/{route}", body)
    assert len(cluster.asked) == 1
    assert b"the server that had the request was lost" in reply.body
    assert reply.body.endswith(b"data: [DONE]\n\n") == (route == "completions")
    before_its_begin = Cluster(server, 1)
    assert b"lost" not in before_its_begin.post(f"/v1/{route}", body).body
    assert len(before_its_begin.asked) == 2


def event(text: str, reason: str | None = None, fingerprint: str = "f") -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    value = {"id": "x", "created": 1, "system_fingerprint": fingerprint, "choices": [choice]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@pytest.mark.parametrize(
    "replay",
    [event("abx"), event("ab", "stop"), event("abcd", fingerprint="g")],
    ids=["other text", "earlier end", "other model"],
)
def test_a_replay_that_differs_is_never_taken_for_a_continuation(replay: bytes) -> None:
    with pytest.raises(DivergedError):
        Resumption(event("abc")).rest(replay)


def test_a_replay_in_other_pieces_goes_on_where_the_stream_broke_off() -> None:
    resumption = Resumption(event("abc") + event("de"))
    assert resumption.rest(event("abcd")) == b""
    (rest,) = resumption.rest(event("efg", "stop")).split(b"\n\n")[:-1]
    assert json.loads(rest[6:])["choices"] == [{"index": 0, "text": "fg", "finish_reason": "stop"}]


def test_strangers_and_routes_of_one_server_are_refused(server: LocalServer) -> None:
    keys = KeyRing([Key.of("a-long-secret", set(RouteScope))])
    cluster = Cluster(server, keys=keys)
    known = {"authorization": "Bearer a-long-secret"}
    about_one = [
        ("POST", "/admin/models/load"), ("GET", "/requests/x/trace"), ("GET", "/metrics"),
        ("GET", "/kv-blocks"),
    ]  # fmt: skip
    for method, path in about_one:
        reply = server.run(call(cluster.front, method, path, b"", known))
        assert reply.status == 404
        assert "about one server" in reply.json()["error"]["message"]
    assert cluster.asked == []
    cluster.post("/v1/completions", {**COMPLETION, "prompt": "a secret"})
    assert cluster.asked[0].body == b"", "the body of a stranger is not read"


def test_errors_of_servers_and_limits_on_bodies_are_passed_on(server: LocalServer) -> None:
    cluster = Cluster(server)
    assert cluster.post("/v1/completions", {**COMPLETION, "max_tokens": -1}).status == 400
    assert cluster.post("/v1/nothing", {}).status == 404
    large = cluster.post("/v1/completions", {"prompt": "x" * Limits().max_body_bytes})
    assert large.status == 413
    assert len(cluster.asked) == 2


def test_a_client_that_leaves_ends_its_request_at_the_server(server: LocalServer) -> None:
    cluster, requests = Cluster(server), server.engine.requests

    async def leave_in_the_midst() -> None:
        leave = asyncio.Event()
        server.engine.running.clear()
        body = json.dumps(COMPLETION).encode()
        asking = asyncio.create_task(
            call(cluster.front, "POST", "/v1/completions", body, leave=leave)
        )
        try:
            while requests.is_idle:
                await asyncio.sleep(0)
            leave.set()
            await asyncio.wait_for(requests.wait_idle(), 10)
        finally:
            server.engine.running.set()
            await asyncio.gather(asking, return_exceptions=True)

    server.run(leave_in_the_midst())
    assert len(cluster.asked) == 1
    server.wait_idle()
