"""`llmserve bench serve` as a user runs it, against scripted servers: loads and figures."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from support.bench_serve import Captured, bench, last_json
from support.scripted_server import Reply, ScriptedServer, well

pytestmark = pytest.mark.http


def test_closed_loop_counts_everything(capsys: Captured) -> None:
    with ScriptedServer() as server:
        code = bench(
            server.base_url, "--num-prompts", "10", "--max-concurrency", "3", "--num-warmups", "2"
        )
    assert code == 0
    result = last_json(capsys)
    assert (result["completed"], result["failed"]) == (10, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (60, 40)
    assert result["model_id"] == "scripted"
    assert result["output_lens_from"] == "usage"
    assert 1 <= result["max_concurrent_requests"] <= 3
    assert result["interrupted"] is False
    assert result["mean_ttft_ms"] > 0
    assert len(server.bodies) == 10 + 1 + 2
    prompts = {tuple(body["prompt"]) for body in server.bodies}
    assert len(prompts) == 13  # none is sent twice
    assert all(len(prompt) == 6 and max(prompt) < 100 for prompt in prompts)
    assert all(body["ignore_eos"] is True for body in server.bodies)


def test_poisson_load_reports_latency_from_the_send_too(capsys: Captured) -> None:
    with ScriptedServer() as server:
        code = bench(server.base_url, "--num-prompts", "20", "--request-rate", "400")
    assert code == 0
    result = last_json(capsys)
    assert result["request_rate"] == 400.0
    assert result["duration"] >= 20 / 400
    assert result["mean_client_queue_time_ms"] >= 0
    assert result["mean_ttft_ms"] == pytest.approx(
        result["mean_ttft_from_send_ms"] + result["mean_client_queue_time_ms"]
    )


def test_stall_shows_in_the_tail_although_the_client_waits(capsys: Captured) -> None:
    """One request at a time and one stall of 0.4 s: counted from the send, one would suffer."""

    async def stalling(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number == 20:
            await asyncio.sleep(0.4)
        await well(reply, body)

    with ScriptedServer(stalling) as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "100", "--request-rate", "100", "--max-concurrency", "1"),
            *("--burstiness", "1000", "--metric-percentiles", "75,90"),
        )
    assert code == 0
    result = last_json(capsys)
    # 40 requests fell due during the stall; their waits are even between 0 and 0.4 s.
    assert result["p90_ttft_ms"] > 200
    assert result["p90_ttft_from_send_ms"] < 100


def test_table_stands_before_the_json(capsys: Captured) -> None:
    with ScriptedServer() as server:
        bench(
            server.base_url,
            *("--num-prompts", "3", "--max-concurrency", "1"),
            *(
                "--metric-percentiles",
                "75",
                "--percentile-metrics",
                "tpot",
                "--goodput",
                "e2el:1e5",
            ),
        )
    captured = capsys.readouterr()
    *table, last = captured.out.splitlines()
    assert table[1] == "closed loop: 1 at a time"
    assert any(" ".join(line.split()) == "milliseconds mean median std p75" for line in table)
    result = json.loads(last)
    assert "p75_tpot_ms" in result
    assert "mean_ttft_ms" not in result
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])


def test_servers_own_metrics_are_in_the_result(tmp_path: Path, capsys: Captured) -> None:
    page = "vllm:prefix_cache_queries_total {n}0\nvllm:prefix_cache_hits_total {n}\n"
    with ScriptedServer(metrics=page) as server:
        code = bench(server.base_url, "--num-prompts", "4", "--markdown", str(tmp_path / "r.md"))
    assert code == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out.splitlines()[-1])["server_metrics"]
    assert (metrics["prefix_cache_queries"], metrics["prefix_cache_hits"]) == (40.0, 4.0)
    assert "10.0% of 40 prompt tokens" in captured.out
    assert "10.0% of 40 prompt tokens" in (tmp_path / "r.md").read_text(encoding="utf-8")


def test_server_without_metrics_is_told_in_one_line(capsys: Captured) -> None:
    with ScriptedServer() as server:
        assert bench(server.base_url, "--num-prompts", "2") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["server_metrics"] is None
    assert captured.err.count("no metrics of the server") == 1


def test_tokens_of_each_chunk_are_asked_for_and_counted(tmp_path: Path, capsys: Captured) -> None:
    async def in_pairs(reply: Reply, body: dict[str, Any]) -> None:
        for index in range(2):
            choice = {"index": 0, "text": "ab", "finish_reason": "length" if index else None}
            usage = {"prompt_tokens": 6, "completion_tokens": 2 * index + 2}
            await reply.event({"choices": [choice], "usage": usage})
        await reply.send(b"data: [DONE]\n\n")

    with ScriptedServer(in_pairs) as server:
        code = bench(server.base_url, "--num-prompts", "2", "--continuous-usage")
    assert code == 0
    assert server.bodies[0]["stream_options"] == {
        "include_usage": True,
        "continuous_usage_stats": True,
    }
    result = last_json(capsys)
    assert (result["tokens_per_chunk"], result["chunk_tokens_from"]) == (2.0, "server")
    assert result["mean_itl_ms"] == pytest.approx(result["mean_tpot_ms"])


def test_key_is_sent_and_not_shown(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ScriptedServer() as server:
        assert bench(server.base_url, "--num-prompts", "1", "--header", "x-more=hidden") == 0
    captured = capsys.readouterr()
    assert all(headers["Authorization"] == "Bearer sk-secret" for _, headers in server.requests)
    assert all(headers["x-more"] == "hidden" for _, headers in server.requests)
    assert "sk-secret" not in captured.out + captured.err
