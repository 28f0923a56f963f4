"""`llmserve bench capacity` against servers whose capacity is known."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmserve.cli import main
from support.scripted_server import Reply, ScriptedServer, well

pytestmark = pytest.mark.http

SERVICE_S = 0.02


def capacity_of(url: str, *arguments: str) -> int:
    search = ("--probe-seconds", "0.5", "--input-len", "4", "--output-len", "1")
    return main(["bench", "capacity", "--base-url", url, *search, *arguments])


def test_knee_of_a_server_that_takes_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    """50 requests/s at most: without a queue below, with an ever longer one above."""
    turn = asyncio.Lock()

    async def one_at_a_time(reply: Reply, body: dict[str, Any]) -> None:
        async with turn:
            await asyncio.sleep(SERVICE_S)
        await well(reply, body)

    with ScriptedServer(one_at_a_time) as server:
        code = capacity_of(
            server.base_url, "--slo", "ttft:250", "--start-rate", "10", "--tolerance", "0.5"
        )
    assert code == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert 10 <= document["capacity"] < document["missed_at"]
    assert document["missed_at"] > 20
    assert len(document["probes"]) == len(captured.err.splitlines())
    assert f"{document['capacity']:.3g} requests/s meet ttft 250 ms for 90%" in captured.out
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts)  # no probe repeats another's


def test_objective_that_no_rate_meets_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.benchmarks.capacity.MAX_DOUBLINGS", 1)
    with ScriptedServer() as server:
        assert capacity_of(server.base_url, "--slo", "ttft:0", "--start-rate", "400") == 1
    captured = capsys.readouterr()
    assert "no rate tried meets ttft 0 ms" in captured.out
    assert json.loads(captured.out.splitlines()[-1])["capacity"] is None


def test_wrong_objective_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity_of("http://127.0.0.1:9", "--slo", "speed:3") == 2
    assert "--slo takes NAME:MILLISECONDS" in capsys.readouterr().err
