"""Structured output over HTTP: every field that asks for it, and what is refused, to whom."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.engine.grammar_compiler import GrammarCompiler
from llmserve.engine.request import Request
from llmserve.errors import RequestError
from llmserve.limits import Limits
from llmserve.sampling import SamplingParams
from llmserve.server.grammar_queue import GrammarQueue
from support.servers import LocalServer, Reply, local_server

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}, "kind": {"enum": ["x"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
WRAPPED = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
needs_grammars = pytest.mark.skipif(not find_spec("llguidance"), reason="needs llguidance")


def ask(server: LocalServer, route: str = "completions", **body: Any) -> Reply:
    """Sampled, so that white space does not go on for ever; 100 tokens at most."""
    prompt: dict[str, Any] = {"prompt": "Once"}
    if route == "chat/completions":
        prompt = {"messages": [{"role": "user", "content": "Once"}]}
    return server.post(f"/v1/{route}", {**prompt, "max_tokens": 200, "seed": 3, **body})


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


@needs_grammars
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    "field",
    [
        {"response_format": WRAPPED},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
    ],
    ids=["response_format", "json", "json text"],
)
def test_a_schema_is_followed(server: LocalServer, route: str, field: dict[str, Any]) -> None:
    value = json.loads(text_of(ask(server, route, **field)))
    assert list(value) == ["age", "kind"]
    assert 1 <= value["age"] <= 9


@needs_grammars
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[ab]{3}-[0-9]"}, r"[ab]{3}-[0-9]"),
        ({"choice": ["yes", "no"]}, r"yes|no"),
        ({"grammar": 'start: "a" ("b" | "c") "d"'}, r"a[bc]d"),
        ({"grammar": 'root ::= "a" [bc] "d"'}, r"a[bc]d"),
    ],
)
def test_other_constraints(server: LocalServer, constraint: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        text = text_of(ask(server, structured_outputs=constraint, seed=seed))
        assert re.fullmatch(pattern, text)


@needs_grammars
def test_any_json_object_is_one(server: LocalServer) -> None:
    reply = ask(server, response_format={"type": "json_object"}, max_tokens=250)
    text = reply.json()["choices"][0]["text"]
    assert text.startswith("{")
    if reply.json()["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


@needs_grammars
def test_a_stream_joins_to_the_whole_and_choices_differ(server: LocalServer) -> None:
    body = {"structured_outputs": {"regex": "[a-z]{12}"}, "n": 3}
    whole = [choice["text"] for choice in ask(server, **body).json()["choices"]]
    assert len(set(whole)) == 3
    pieces = [""] * 3
    for event in ask(server, **body, stream=True).events():
        pieces[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert pieces == whole
    server.wait_idle()


@needs_grammars
@pytest.mark.parametrize(
    "field",
    [
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_grammar_hurts_its_sender_alone(
    server: LocalServer, field: dict[str, Any], stream: bool
) -> None:
    neighbour = {"prompt": "Once", "max_tokens": 30}
    alone = server.complete(**neighbour).json()["choices"][0]["text"]
    texts: list[str] = []
    thread = threading.Thread(
        target=lambda: texts.append(server.complete(**neighbour).json()["choices"][0]["text"])
    )
    thread.start()
    reply = ask(server, **field, stream=stream)
    thread.join(10)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == next(iter(field))
    assert texts == [alone]
    server.wait_idle()


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            "response_format",
        ),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs"),
        ({"structured_outputs": {"tree": "a"}}, "structured_outputs"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
    ],
)
def test_shapes_that_are_refused(server: LocalServer, field: dict[str, Any], param: str) -> None:
    reply = ask(server, **field)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


@needs_grammars
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"structured_outputs": {"regex": "a" * 101}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a", "b", "c", "d"]}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens"),
    ],
)
def test_bounds(model_folder: Path, field: dict[str, Any], param: str) -> None:
    limits = Limits(max_grammar_chars=100, max_choice_texts=3)
    with local_server(model_folder, limits=limits) as server:
        reply = ask(server, **field)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False}},
    ],
)
def test_what_asks_for_nothing_changes_nothing(server: LocalServer, field: dict[str, Any]) -> None:
    plain = ask(server, max_tokens=9).json()["choices"]
    assert ask(server, max_tokens=9, **field).json()["choices"] == plain


def test_without_the_library_it_says_what_to_install(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.server.grammar_fields.find_spec", lambda _name: None)
    reply = ask(server, response_format={"type": "json_object"})
    assert reply.status == 400
    assert "llmserve[structured]" in reply.json()["error"]["message"]


class Gate(GrammarCompiler):
    """A compiler that waits to be let through."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.num_compiled = 0

    def compile(self, grammar: Grammar) -> Any:
        assert self.open.wait(10)
        self.num_compiled += 1
        if grammar.text == "bad":
            raise RequestError("no", param="response_format")
        return object()


def request(name: str, text: str = "a") -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1],
        sampling_params=SamplingParams(),
        seed=0,
        grammar=Grammar(GrammarKind.REGEX, text),
    )


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def drain(queue: GrammarQueue) -> list[tuple[str, bool]]:
    found = []
    while queue.is_busy:
        queue.wait(0.1)
        for taken, outcome in queue.ready():
            found.append((taken.request_id, isinstance(outcome, RequestError)))
    return found


def test_requests_wait_for_their_grammars_and_a_known_one_is_not_compiled_again(
    gate: Gate,
) -> None:
    queue = GrammarQueue(lambda: gate, timeout_s=10)
    queue.add(request("a"))
    assert list(queue.ready()) == []
    gate.open.set()
    assert drain(queue) == [("a", False)]
    queue.add(request("b"))
    queue.add(request("c", "bad"))
    assert sorted(drain(queue)) == [("b", False), ("c", True)]
    assert gate.num_compiled == 2
    queue.close()


def test_a_slow_one_is_refused_in_time_and_an_aborted_one_forgotten(gate: Gate) -> None:
    queue = GrammarQueue(lambda: gate, timeout_s=0.05)
    queue.add(request("slow"))
    queue.add(request("gone", "b"))
    queue.forget("gone")
    assert drain(queue) == [("slow", True)]
    gate.open.set()
    queue.close()


def test_what_an_earlier_engine_had_is_not_given_up_and_ends_where_its_choices_do(
    gate: Gate,
) -> None:
    queue = GrammarQueue(lambda: gate, timeout_s=0.05)
    for name in ("goes on", "met a stop"):
        queue.add(replace(request(name), output_token_ids=[[5]]))
    queue.finish("met a stop", 0)
    assert queue.request_ids == {"goes on"}
    queue.wait(0.1)
    assert list(queue.ready()) == []
    gate.open.set()
    assert drain(queue) == [("goes on", False)]
    queue.close()


@needs_grammars
def test_a_folder_that_was_changed_gives_no_grammars(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder)
    with local_server(folder) as server:
        (folder / "tokenizer.json").touch()
        reply = ask(server, structured_outputs={"regex": "a"})
        assert reply.status == 500
        assert "were changed" in reply.json()["error"]["message"]
        assert ask(server).status == 200


def test_what_the_compiler_does_not_expect_is_the_requests_failure(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    monkeypatch.setattr(gate, "compile", lambda _grammar: 1 // 0)
    queue = GrammarQueue(lambda: gate, timeout_s=10)
    queue.add(request("a"))
    assert drain(queue) == [("a", True)]
    queue.close()
