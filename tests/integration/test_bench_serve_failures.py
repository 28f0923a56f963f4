"""`llmserve bench serve` where something goes wrong: servers, disks, interruptions."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from support.bench_serve import Captured, bench, last_json
from support.scripted_server import Reply, ScriptedServer, well

pytestmark = pytest.mark.http


def test_dead_server_is_one_clear_line(capsys: Captured) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert bench(url) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"llmserve: error: cannot reach {url}/v1/models: ")
    assert captured.err.count("\n") == 1


def test_server_that_is_loading_is_waited_for(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.benchmarks.ready.RETRY_S", 0.01)

    async def loading(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number < 3:
            reply.refuse(503, "loading the model")
        else:
            await well(reply, body)

    with ScriptedServer(loading) as server:
        assert bench(server.base_url, "--num-prompts", "2", "--ready-check-timeout-sec", "5") == 0
    with ScriptedServer(loading) as server:
        assert bench(server.base_url, "--num-prompts", "2") == 1
    assert "HTTP 503: loading the model" in capsys.readouterr().err


def test_first_request_that_fails_ends_it_with_the_servers_words(capsys: Captured) -> None:
    async def refuse(reply: Reply, body: dict[str, Any]) -> None:
        reply.refuse(401, "wrong key")

    with ScriptedServer(refuse) as server:
        assert bench(server.base_url) == 1
    assert "HTTP 401: wrong key" in capsys.readouterr().err
    assert len(server.bodies) == 1


def test_warm_up_that_fails_ends_it(capsys: Captured) -> None:
    async def once(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number:
            reply.refuse(500, "broken")
        else:
            await well(reply, body)

    with ScriptedServer(once) as server:
        assert bench(server.base_url, "--num-warmups", "3") == 1
    assert "3 of 3 warm-up requests failed: HTTP 500: broken" in capsys.readouterr().err


def test_server_that_dies_half_way_leaves_partial_results(capsys: Captured) -> None:
    async def dying(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number < 6:
            await well(reply, body)
        else:
            await reply.token("a")
            reply.cut()

    with ScriptedServer(dying) as server:
        code = bench(server.base_url, "--num-prompts", "12", "--max-concurrency", "2")
    assert code == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["completed"], result["failed"]) == (5, 7)
    assert result["errors_by_kind"] == {"connection": 7}
    assert result["total_output_tokens"] == 20
    assert "7 requests failed (connection), the first so: " in captured.err


def test_server_that_never_ends_is_timed_out(capsys: Captured) -> None:
    async def stuck(reply: Reply, body: dict[str, Any]) -> None:
        await well(reply, body) if reply.number < 2 else await asyncio.sleep(60)

    with ScriptedServer(stuck) as server:
        code = bench(server.base_url, "--num-prompts", "4", "--request-timeout-sec", "1")
    assert code == 1
    assert last_json(capsys)["errors_by_kind"] == {"timeout": 3}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_prints_what_had_ended_and_exits_130(
    number: signal.Signals, tmp_path: Path, capsys: Captured
) -> None:
    async def interrupting(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number < 4:
            await well(reply, body)
            return
        if reply.number == 4:
            os.kill(os.getpid(), number)
        await asyncio.sleep(60)

    with ScriptedServer(interrupting) as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "50", "--max-concurrency", "1", "--save-result"),
            *("--result-dir", str(tmp_path), "--result-filename", "partial.json"),
        )
    assert code == 130
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["interrupted"] is True
    assert (result["completed"], result["failed"]) == (3, 0)
    assert "Traceback" not in captured.err
    saved = json.loads((tmp_path / "partial.json").read_text(encoding="utf-8"))
    assert saved["completed"] == 3


def test_server_that_streams_garbage_is_a_clear_end(capsys: Captured) -> None:
    async def garbage(reply: Reply, body: dict[str, Any]) -> None:
        await well(reply, body) if reply.number < 3 else await reply.send(b"data: \xff\xfe{\n\n")

    with ScriptedServer(garbage) as server:
        code = bench(server.base_url, "--num-prompts", "5", "--max-concurrency", "1")
    assert code == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["completed"], result["errors_by_kind"]) == (2, {"garbage": 3})
    assert "3 requests failed (garbage), the first so: an event is not JSON" in captured.err
