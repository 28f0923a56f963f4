"""`llmserve bench serve` as a user runs it, against scripted servers."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from llmserve.cli import main
from support.scripted_server import MODEL, Reply, ScriptedServer, well
from support.traces import mooncake_trace

pytestmark = pytest.mark.http

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def bench(url: str, *arguments: str) -> int:
    lengths = () if "--dataset-name" in arguments else ("--input-len", "6", "--output-len", "4")
    return main(["bench", "serve", "--base-url", url, *lengths, *arguments])


def last_json(capsys: Captured) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


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


def test_trace_is_replayed_with_its_times_lengths_and_blocks(
    tmp_path: Path, capsys: Captured
) -> None:
    rows = [(0.0, 1024, 32, [1, 2]), (0.2, 600, 64, [1, 3]), (0.4, 100, 16, [4])]
    path = mooncake_trace(tmp_path / "t.jsonl", rows)
    with ScriptedServer() as server:
        code = main(
            [
                *("bench", "serve", "--base-url", server.base_url, "--trace", str(path)),
                *("--length-scale", "1/16", "--time-scale", "2", "--save-result"),
                *("--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"),
            ]
        )
    assert code == 0
    _, first, second, third = (body["prompt"] for body in server.bodies)
    assert [len(prompt) for prompt in (first, second, third)] == [64, 38, 7]
    assert first[:32] == second[:32]
    assert [body["max_tokens"] for body in server.bodies[1:]] == [2, 4, 1]
    saved = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert saved["start_times"] == pytest.approx([0.0, 0.1, 0.2])
    assert last_json(capsys)["traffic"].startswith("open loop: t.jsonl, times / 2")


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


def test_result_is_saved_with_details(tmp_path: Path, capsys: Captured) -> None:
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "4", "--max-concurrency", "2", "--save-result", "--save-detailed"),
            *("--result-dir", str(tmp_path / "results"), "--result-filename", "r.json"),
            *("--html", str(tmp_path / "pages" / "r.html")),
        )
    assert code == 0
    page = (tmp_path / "pages" / "r.html").read_text(encoding="utf-8")
    assert "Load test of scripted" in page
    assert page.count("<svg") == 6
    saved = json.loads((tmp_path / "results" / "r.json").read_text(encoding="utf-8"))
    printed = last_json(capsys)
    assert saved["input_lens"] == [6] * 4
    assert saved["output_lens"] == [4] * 4
    assert saved["generated_texts"] == ["t0 t1 t2 t3 "] * 4
    assert [len(gaps) for gaps in saved["itls"]] == [3] * 4
    assert "input_lens" not in printed
    assert printed.items() <= saved.items()


def test_result_that_cannot_be_saved_is_an_error_after_the_figures(
    tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "file").write_text("")
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "2", "--save-result", "--result-dir", str(tmp_path / "file")),
        )
    captured = capsys.readouterr()
    assert code == 1
    assert json.loads(captured.out.splitlines()[-1])["completed"] == 2
    assert "cannot save the result" in captured.err


def test_chat_takes_random_text_of_exact_length(capsys: Captured) -> None:
    with ScriptedServer(words=True) as server:
        code = bench(server.base_url, "--endpoint", "/v1/chat/completions", "--num-prompts", "3")
    assert code == 0
    contents = [body["messages"][0]["content"] for body in server.bodies]
    assert all(len(content.split()) == 6 for content in contents)
    result = last_json(capsys)
    assert result["backend"] == "openai-chat"
    assert result["total_input_tokens"] == 18


def test_text_prompts_are_sent_as_they_are(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("First one.\nSecond one.\n", encoding="utf-8")
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--dataset-name", "text", "--dataset-path", str(path), "--num-prompts", "2"),
            *("--output-len", "3", "--max-concurrency", "1", "--temperature", "0"),
        )
    assert code == 0
    assert [body["prompt"] for body in server.bodies][1:] == ["First one.", "Second one."]
    assert all(body["max_tokens"] == 3 and body["temperature"] == 0 for body in server.bodies)
    assert not any("ignore_eos" in body for body in server.bodies)
    assert last_json(capsys)["total_output_tokens"] == 6


def test_server_that_refuses_usage_is_counted_by_chunks(capsys: Captured) -> None:
    async def strict(reply: Reply, body: dict[str, Any]) -> None:
        if "stream_options" in body:
            reply.refuse(400, "unknown field: stream_options")
        else:
            await well(reply, body)

    with ScriptedServer(strict) as server:
        assert bench(server.base_url, "--num-prompts", "3") == 0
    result = last_json(capsys)
    assert (result["completed"], result["total_output_tokens"]) == (3, 12)
    assert result["output_lens_from"] == "chunks"
    assert ["stream_options" in body for body in server.bodies] == [True, *[False] * 4]


def test_server_that_refuses_ids_is_sent_text(capsys: Captured) -> None:
    async def texts_only(reply: Reply, body: dict[str, Any]) -> None:
        if isinstance(body["prompt"], str):
            await well(reply, body)
        else:
            reply.refuse(422, "prompt must be a string")

    with ScriptedServer(texts_only, words=True) as server:
        assert bench(server.base_url, "--num-prompts", "3") == 0
    assert last_json(capsys)["total_input_tokens"] == 18
    assert [type(body["prompt"]) for body in server.bodies] == [list, *[str] * 4]


def test_vocabulary_comes_from_the_tokenizer_when_the_model_does_not_tell(
    capsys: Captured,
) -> None:
    with ScriptedServer(model={"id": "quiet"}, words=True) as server:
        assert bench(server.base_url, "--num-prompts", "2") == 0
    # The scripted tokenizer numbers the sample text's words by their length.
    assert max(max(body["prompt"]) for body in server.bodies) < 20


def test_vocabulary_of_llama_cpp_is_found(capsys: Captured) -> None:
    with ScriptedServer(model={"id": "gguf", "meta": {"n_vocab": 5}}) as server:
        assert bench(server.base_url, "--num-prompts", "2") == 0
    assert {token for body in server.bodies for token in body["prompt"]} <= set(range(5))


@pytest.mark.parametrize(
    ("model", "arguments", "code", "message"),
    [
        ({"id": "quiet"}, [], 1, "give --vocab-size"),
        (MODEL, ["--endpoint", "/v1/chat/completions"], 1, "use --dataset-name text"),
        ({**MODEL, "max_model_len": 9}, [], 2, "make 10 tokens; the context of scripted is 9"),
    ],
)
def test_prompts_that_cannot_be_made_are_explained(
    model: dict[str, Any], arguments: list[str], code: int, message: str, capsys: Captured
) -> None:
    with ScriptedServer(model=model) as server:
        assert bench(server.base_url, *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert server.bodies == []


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


def test_interrupt_prints_what_had_ended_and_exits_130(tmp_path: Path, capsys: Captured) -> None:
    async def interrupting(reply: Reply, body: dict[str, Any]) -> None:
        if reply.number < 4:
            await well(reply, body)
            return
        if reply.number == 4:
            os.kill(os.getpid(), signal.SIGINT)
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


def test_key_is_sent_and_not_shown(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ScriptedServer() as server:
        assert bench(server.base_url, "--num-prompts", "1", "--header", "x-more=hidden") == 0
    captured = capsys.readouterr()
    assert all(headers["Authorization"] == "Bearer sk-secret" for _, headers in server.requests)
    assert all(headers["x-more"] == "hidden" for _, headers in server.requests)
    assert "sk-secret" not in captured.out + captured.err


def test_conversations_grow_by_the_servers_replies(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"turns": ["Hello?", "And then?"]}\n{"turns": ["Once."]}\n', encoding="utf-8")
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--endpoint", "/v1/chat/completions", "--dataset-name", "mt-bench"),
            *("--dataset-path", str(path), "--multi-turn", "--max-concurrency", "1"),
            *("--num-prompts", "3", "--output-len", "2"),
        )
    assert code == 0
    talks = [[message["content"] for message in body["messages"]] for body in server.bodies[1:]]
    hello = [["Hello?"], ["Hello?", "t0 t1 ", "And then?"]]
    assert talks == [*hello, ["Once."], *hello]
    result = last_json(capsys)
    assert (result["completed"], result["failed"]) == (5, 0)
    assert [(turn["turn"], turn["completed"]) for turn in result["by_turn"]] == [(0, 3), (1, 2)]


def test_random_conversations_are_made_where_the_server_tokenizes(capsys: Captured) -> None:
    with ScriptedServer(words=True) as server:
        code = bench(
            server.base_url,
            *("--endpoint", "/v1/chat/completions", "--multi-turn", "--num-turns", "2"),
            *("--num-prompts", "2", "--max-concurrency", "2"),
        )
    assert code == 0
    assert sorted(len(body["messages"]) for body in server.bodies[1:]) == [1, 1, 3, 3]
    assert last_json(capsys)["completed"] == 4


def test_first_turn_of_a_chat_set_is_a_prompt_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    said = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]
    path.write_text(json.dumps([{"conversations": said}]), encoding="utf-8")
    with ScriptedServer() as server:
        chat_set = ("--dataset-name", "sharegpt", "--dataset-path", str(path))
        assert bench(server.base_url, *chat_set, "--num-prompts", "2", "--output-len", "3") == 0
    assert [body["prompt"] for body in server.bodies] == ["Hi."] * 3


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


def test_full_disk_loses_no_figure_and_no_other_file(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(data)

    monkeypatch.setattr("llmserve.benchmarks.load_report.write_bytes", write)
    with ScriptedServer() as server:
        code = bench(
            server.base_url,
            *("--num-prompts", "2", "--html", str(tmp_path / "r.html")),
            *("--markdown", str(tmp_path / "r.md")),
        )
    assert code == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["completed"] == 2
    assert "r.html: [Errno 28] No space left on device" in captured.err
    assert (tmp_path / "r.md").exists()


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
