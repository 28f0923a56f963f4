"""Where a request's time went: told of every step that was its own, to nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.traces import MAX_REQUESTS, TraceStore
from support.engines import make_request
from support.servers import LocalServer, local_server

ANN, BOB = "a-key-of-ann", "a-key-of-bob"


def trace(server: LocalServer, request_id: str, query: str = "", **headers: str) -> Any:
    reply = server.get(f"/requests/{request_id}/trace{query}", **headers)
    assert reply.status == 200, reply.body
    return reply.json()


def test_every_step_of_a_request_is_told(model_folder: Path) -> None:
    with local_server(model_folder, engine={"max_batched_tokens": 32}) as server:
        reply = server.complete(prompt=[5] * 100, max_tokens=6).json()
        (found,) = trace(server, reply["id"])["prompts"]
        assert trace(server, reply["id"].removeprefix("cmpl-"))["prompts"] == [found]
    steps = found["steps"]
    prefill = [step["tokens"] for step in steps if step["kind"] == "prefill"]
    assert sum(prefill) == 100
    assert len(prefill) > 3
    assert [step["tokens"] for step in steps if step["kind"] == "decode"] == [1] * 5
    assert found["output_tokens"] == 6
    assert found["finish_reasons"] == ["length"]
    assert found["preemptions"] == 0
    assert all(step["batch_tokens"] >= step["tokens"] for step in steps)
    times = [step["at_s"] for step in steps]
    assert times == sorted(times)
    parts = [found[name] for name in ("queue_s", "prefill_s", "decode_s")]
    assert sum(parts) == pytest.approx(found["total_s"])


def test_cached_blocks_choices_and_several_prompts(server: LocalServer) -> None:
    prompt = [9, 8, 7, 6] * 20
    server.complete(prompt=prompt, max_tokens=1)
    reply = server.complete(prompt=[prompt, [3]], max_tokens=3, n=2).json()
    first, second = trace(server, reply["id"])["prompts"]
    assert first["cached_blocks"] == 4
    assert first["cached_tokens"] >= 64
    assert second["prompt_tokens"] == 1
    assert first["output_tokens"] == 6
    assert {step["choice"] for step in first["steps"]} == {0, 1}


def test_preemptions_are_told(model_folder: Path) -> None:
    sizes = {"cache_bytes": 2 * 16 * 8 * 17, "max_num_seqs": 8, "max_seq_len": 256}
    with local_server(model_folder, engine=sizes) as server:
        reply = server.complete(prompt=[[n] * 100 for n in range(3, 8)], max_tokens=100).json()
        prompts = trace(server, reply["id"])["prompts"]
        assert server.engine.stats is not None
        total = server.engine.stats.num_preemptions
    assert sum(found["preemptions"] for found in prompts) == total
    assert total > 0


def test_chat_vectors_and_the_chrome_form(server: LocalServer) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}
    reply = server.post("/v1/chat/completions", chat).json()
    events = trace(server, reply["id"], "?format=chrome")["traceEvents"]
    assert {event["name"] for event in events} >= {"queue", "prefill"}
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)
    bad = server.get(f"/requests/{reply['id']}/trace?format=xml")
    assert (bad.status, bad.json()["error"]["param"]) == (400, "format")


def test_nobody_sees_anothers(model_folder: Path) -> None:
    keys = KeyRing([Key.of(secret, {RouteScope.USER}) for secret in (ANN, BOB)])
    with local_server(model_folder, keys=keys) as server:
        body = {"prompt": "x", "max_tokens": 1}
        request_id = server.post("/v1/completions", body, authorization=f"Bearer {ANN}").json()[
            "id"
        ]
        path = f"/requests/{request_id}/trace"
        assert server.get(path, authorization=f"Bearer {ANN}").status == 200
        assert server.get(path, authorization=f"Bearer {BOB}").status == 404
        assert server.get(path).status == 401


def test_the_latest_are_kept() -> None:
    store = TraceStore()
    for index in range(MAX_REQUESTS + 5):
        store.begin([make_request(f"r{index}", [1])], block_size=16)
    assert store.find("r4", "") == []
    assert len(store.find("r5", "")) == 1
    assert store.find("cmpl-nobody", "") == []


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_timing_comes_with_usage_where_it_is_asked_for(server: LocalServer, route: str) -> None:
    body: dict[str, Any] = {"max_tokens": 4, "timing": True, "prompt": "x"}
    if route == "chat/completions":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    usage = server.post(f"/v1/{route}", body).json()["usage"]
    assert usage["timing"].keys() == {"queue_s", "prefill_s", "decode_s", "total_s"}
    assert usage["timing"]["total_s"] > 0
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    assert "timing" in server.post(f"/v1/{route}", stream).events()[-1]["usage"]
    assert "timing" not in server.post(f"/v1/{route}", {**body, "timing": False}).json()["usage"]
