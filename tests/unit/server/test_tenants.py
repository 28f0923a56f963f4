"""R25: what one key asked is not found by another, and who runs on whose account."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.engine.request import Request
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.engine_requests import cache_salt
from support.servers import LocalServer, Reply, local_server

ANN, BOB = "a-key-of-ann", "a-key-of-bob"
KEYS = KeyRing([Key.of(secret, {RouteScope.USER}) for secret in (ANN, BOB)])
PROMPT = [5, 6, 7] * 20


@pytest.fixture
def guarded(model_folder: Path) -> Iterator[LocalServer]:
    with local_server(model_folder, keys=KEYS) as server:
        yield server
        server.wait_idle()


@pytest.fixture
def shared(model_folder: Path) -> Iterator[LocalServer]:
    with local_server(model_folder, keys=KEYS, shares_prefix_cache=True) as server:
        yield server


def ask(server: LocalServer, key: str = "", **body: Any) -> Reply:
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, **body}
    return server.post("/v1/completions", body, authorization=f"Bearer {key}" if key else "")


def cached(server: LocalServer, key: str = "", **body: Any) -> int:
    reply = ask(server, key, **body)
    assert reply.status == 200, reply.body
    tokens: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_r25_keys_find_their_own_prompts_and_nobody_elses(guarded: LocalServer) -> None:
    assert cached(guarded, ANN) == 0
    assert cached(guarded, BOB) == 0
    assert cached(guarded, ANN) > 0
    assert cached(guarded, BOB) > 0


def test_r25_both_routes_and_both_headers_name_the_same_tenant(guarded: LocalServer) -> None:
    chat = {"messages": [{"role": "user", "content": "Once upon a time" * 4}], "max_tokens": 1}

    def hits(**headers: str) -> int:
        reply = guarded.post("/v1/chat/completions", chat, **headers).json()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert hits(authorization=f"Bearer {ANN}") == 0
    assert hits(x_api_key=BOB) == 0
    assert hits(x_api_key=ANN) > 0


def test_sharing_is_for_those_who_ask_for_it(shared: LocalServer) -> None:
    assert cached(shared, ANN) == 0
    assert cached(shared, BOB) > 0
    assert cached(shared, BOB, cache_salt="mine") == 0


def test_without_keys_all_share(server: LocalServer) -> None:
    cached(server)
    assert cached(server) > 0


def test_a_salt_of_ones_own_parts_requests_of_one_key(guarded: LocalServer) -> None:
    assert cached(guarded, ANN) == 0
    assert cached(guarded, ANN, cache_salt="mine") == 0
    assert cached(guarded, ANN, cache_salt="mine") > 0
    assert cached(guarded, BOB, cache_salt="mine") == 0
    assert cached(guarded, ANN, cache_salt="") > 0


def test_no_own_salt_reaches_another_tenant() -> None:
    salts = {
        cache_salt(tenant, own)
        for tenant in ("", "ab", "abcd")
        for own in ("", "cd", "/", "ab/", "/cd", cache_salt("", ""), cache_salt("ab", "cd"), "é")
    }
    assert len(salts) == 3 * 8 - 3, "two of the own salts are equal, and no others"


def test_a_salt_is_kept_short_whatever_its_length() -> None:
    assert len(cache_salt("ab", "x" * 100_000)) < 100


def test_the_cache_can_be_off(model_folder: Path) -> None:
    with local_server(model_folder, engine={"has_prefix_cache": False}) as server:
        assert [cached(server), cached(server)] == [0, 0]


def test_siblings_do_not_count_as_hits(server: LocalServer) -> None:
    prompts = [[8] * 50, [9] * 50]
    assert cached(server, prompt=prompts, n=3) == 0
    once = cached(server, prompt=prompts)
    assert once > 0
    assert cached(server, prompt=prompts, n=3) == once


def requests_seen(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    seen: list[Request] = []
    add = server.engine.engine.add_request

    def watch(request: Request) -> None:
        seen.append(request)
        add(request)

    monkeypatch.setattr(server.engine.engine, "add_request", watch)
    return seen


def test_the_engine_is_told_on_whose_account_a_request_runs(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"policy": "fair"}
    with local_server(model_folder, keys=KEYS, shares_prefix_cache=True, engine=engine) as server:
        seen = requests_seen(server, monkeypatch)
        ask(server, ANN, priority=-3)
        ask(server, BOB)
        tenants = [Key.of(secret, ()).tenant for secret in (ANN, BOB)]
        assert [request.tenant for request in seen] == tenants
        assert [request.priority for request in seen] == [-3, 0]


def test_priority_needs_a_policy_that_looks_at_it(model_folder: Path, server: LocalServer) -> None:
    assert ask(server, priority=0).status == 200
    refused = ask(server, priority=1)
    assert refused.status == 400
    assert refused.json()["error"]["param"] == "priority"
    with local_server(model_folder, engine={"policy": "priority"}) as other:
        assert ask(other, priority=1).status == 200
        for value in (2**31, -(2**31) - 1, "1", 1.5):
            reply = ask(other, priority=value)
            assert reply.status == 400
            assert reply.json()["error"]["param"] == "priority"


def test_lower_priorities_are_answered_first(model_folder: Path) -> None:
    engine = {"policy": "priority", "max_num_seqs": 1}
    with local_server(model_folder, engine=engine) as server:
        # One request of many prompts is one priority, so three are sent, and held until all wait.
        server.loop.call_soon_threadsafe(server.engine.running.clear)
        order = server.run(_send_and_release(server, [2, 1, 0]))
        assert order == [0, 1, 2]


async def _send_and_release(server: LocalServer, priorities: list[int]) -> list[int]:
    import asyncio
    import json

    from support.servers import call

    ended: list[int] = []

    async def send(priority: int) -> None:
        body = json.dumps({"prompt": [5], "max_tokens": 3, "priority": priority}).encode()
        assert (await call(server.app, "POST", "/v1/completions", body)).status == 200
        ended.append(priority)

    sending = [asyncio.create_task(send(priority)) for priority in priorities]
    while server.engine.requests.num_sequences < len(priorities):
        await asyncio.sleep(0)
    server.engine.running.set()
    await asyncio.gather(*sending)
    return ended
