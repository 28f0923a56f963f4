"""What `llmserve bench serve` sends: random prompts, texts, traces, conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.cli import main
from support.bench_serve import Captured, bench, last_json
from support.scripted_server import MODEL, Reply, ScriptedServer, well
from support.traces import mooncake_trace

pytestmark = pytest.mark.http


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
