"""Tools and reasoning over HTTP: what the model is told, and what its answer becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmserve.engine.request import Request
from llmserve.runners.protocol import SamplingRow
from llmserve.text.tokenizer import Tokenizer
from support.models import make_model_folder
from support.servers import LocalServer, Reply, local_server

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Bern", "Rome"]}},
        },
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}
ASK = [{"role": "user", "content": "hi"}]
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
HERMES = (
    "{% if tools %}T{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
LLAMA = HERMES.replace("tool_call>", "call>")
THINKER = HERMES + "{% if think %}<think>\n{% endif %}{# </think> #}"
needs_grammars = pytest.mark.skipif(not find_spec("llguidance"), reason="needs llguidance")


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for descriptions of tools."""
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny", max_seq_len=1024)


@contextmanager
def serving(folder: Path, tmp_path: Path, template: str, text: str = "") -> Iterator[LocalServer]:
    """A server with a template of its own, whose model always writes `text`."""
    file = tmp_path / "template.jinja"
    file.write_text(template)
    ids = Tokenizer.load(folder).encode(text, add_special_tokens=False)

    def script(row: SamplingRow) -> int | None:
        made = len(row.token_ids) - row.num_prompt_tokens
        if not text:
            return None
        return ids[made] if made < len(ids) else 0

    with local_server(folder, chat_template=file, script=script) as server:
        yield server


def chat(server: LocalServer, **body: Any) -> Reply:
    return server.post("/v1/chat/completions", {"messages": ASK, "seed": 1, **body})


def message_of(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    message: dict[str, Any] = reply.json()["choices"][0]["message"]
    return message


def streamed(reply: Reply) -> tuple[dict[str, Any], list[Any]]:
    """The message that a stream's deltas make, and their finish reasons."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    reasons = []
    for event in reply.events():
        (choice,) = event["choices"]
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        for call in delta.get("tool_calls", []):
            assert call.pop("index") == len(message["tool_calls"])
            message["tool_calls"].append(call["function"])
        reasons.append(choice["finish_reason"])
    return message, reasons


def prompt_text(server: LocalServer, folder: Path, **body: Any) -> str:
    """The prompt that a chat request becomes."""
    seen: list[Request] = []
    add = server.engine.engine.add_request

    def watch(request: Request, matcher: Any = None) -> None:
        seen.append(request)
        add(request, matcher)

    server.engine.engine.add_request = watch  # type: ignore[method-assign]
    try:
        reply = chat(server, max_tokens=1, **body)
    finally:
        server.engine.engine.add_request = add  # type: ignore[method-assign]
    assert reply.status == 200, reply.body
    return Tokenizer.load(folder).decode(seen[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>"),
        (PLAIN, f"<tool_call>\n{CALL}\n</tool_call>"),
        (LLAMA, CALL.replace("arguments", "parameters")),
    ],
    ids=["hermes", "plain", "llama"],
)
def test_a_call_is_told_whole_and_in_a_stream(
    long_folder: Path, tmp_path: Path, template: str, text: str
) -> None:
    with serving(long_folder, tmp_path, template, text) as server:
        reply = chat(server, tools=[TOOL])
        message = message_of(reply)
        assert message["content"] is None
        (call,) = message["tool_calls"]
        assert call["type"] == "function"
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        assert reply.json()["choices"][0]["finish_reason"] == "tool_calls"
        found, reasons = streamed(chat(server, tools=[TOOL], stream=True))
        assert found == {"content": "", "reasoning": "", "tool_calls": [call["function"]]}
        assert reasons[-1] == "tool_calls"


def test_text_beside_calls_and_one_call_at_most_where_asked(
    long_folder: Path, tmp_path: Path
) -> None:
    text = f"Let me see. <tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    with serving(long_folder, tmp_path, HERMES, text) as server:
        message = message_of(chat(server, tools=[TOOL]))
        assert message["content"] == "Let me see. "
        assert len(message["tool_calls"]) == 2
        alone = message_of(chat(server, tools=[TOOL], parallel_tool_calls=False))
        assert len(alone["tool_calls"]) == 1
        body = {"tools": [TOOL], "parallel_tool_calls": False, "stream": True}
        assert len(streamed(chat(server, **body))[0]["tool_calls"]) == 1


@pytest.mark.parametrize("body", [{}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}])
def test_without_tools_a_call_is_text(
    long_folder: Path, tmp_path: Path, body: dict[str, Any]
) -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    with serving(long_folder, tmp_path, HERMES, text) as server:
        message = message_of(chat(server, **body))
        assert message["content"] == text
        assert "tool_calls" not in message


def test_log_probabilities_of_held_back_tokens_come_with_the_next_event(
    long_folder: Path, tmp_path: Path
) -> None:
    with serving(long_folder, tmp_path, HERMES, f"<tool_call>{CALL}</tool_call>") as server:
        body = {"tools": [TOOL], "logprobs": True}
        whole = chat(server, **body).json()["choices"][0]["logprobs"]["content"]
        events = chat(server, **body, stream=True).events()
        pieces = [entry for event in events for entry in event["choices"][0]["logprobs"]["content"]]
    assert pieces == whole


@needs_grammars
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "other"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_a_call_that_must_be_made_is_made(
    long_folder: Path, tmp_path: Path, choice: Any, names: set[str]
) -> None:
    """The scripted model writes noise; the grammar leaves it nothing but a call."""
    called = set()
    with serving(long_folder, tmp_path, PLAIN) as server:
        for seed in range(6):
            body = {"tools": [TOOL, OTHER], "tool_choice": choice, "seed": seed}
            reply = chat(server, **body, max_tokens=150)
            if reply.json()["choices"][0]["finish_reason"] == "length":
                continue  # `other` takes any object
            (call,) = message_of(reply)["tool_calls"]
            called.add(call["function"]["name"])
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "weather":
                assert arguments["city"] in ("Bern", "Rome")
    assert called
    assert called <= names


def test_the_model_is_told_of_tools_and_their_answers(long_folder: Path, tmp_path: Path) -> None:
    turns = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    with serving(long_folder, tmp_path, HERMES) as server:
        text = prompt_text(server, long_folder, messages=turns, tools=[TOOL])
        assert text.startswith('T[{"type": "function", "function": {"name": "weather"')
        assert '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>' in text
        assert "<tool>rain" in text
        alone = prompt_text(server, long_folder, tools=[TOOL], tool_choice="none")
        assert "weather" not in alone
    with serving(long_folder, tmp_path, PLAIN) as server:
        text = prompt_text(server, long_folder, messages=turns, tools=[TOOL])
        assert text.startswith("<system>You may call these functions:\n{")
        assert '<assistant><tool_call>\n{"name": "weather", "arguments"' in text
        assert "<user><tool_response>\nrain\n</tool_response>" in text
        system = [{"role": "system", "content": "Be kind."}, *ASK]
        text = prompt_text(server, long_folder, messages=system, tools=[TOOL])
        assert text.startswith("<system>Be kind.\n\nYou may call")


def test_reasoning_is_told_apart(long_folder: Path, tmp_path: Path) -> None:
    text = "<think>\nshe saw a dog\n</think>\n\nThe dog."
    with serving(long_folder, tmp_path, THINKER, text) as server:
        message = message_of(chat(server))
        assert (message["reasoning"], message["content"]) == ("she saw a dog", "The dog.")
        found, _ = streamed(chat(server, stream=True))
        assert (found["reasoning"], found["content"]) == ("she saw a dog", "The dog.")
        assert "reasoning" not in message_of(chat(server, include_reasoning=False))
        opened = message_of(chat(server, chat_template_kwargs={"think": True}))
        assert opened["reasoning"].startswith("<think>\nshe saw")
    with serving(long_folder, tmp_path, HERMES, text) as server:
        assert message_of(chat(server))["content"] == text


def test_the_last_message_can_be_gone_on_with(long_folder: Path, tmp_path: Path) -> None:
    turns = [*ASK, {"role": "assistant", "content": "The dog "}]
    with serving(long_folder, tmp_path, HERMES) as server:
        text = prompt_text(server, long_folder, messages=turns, continue_final_message=True)
        assert text.endswith("<assistant>The dog")
        assert prompt_text(server, long_folder, messages=turns).endswith("<a>")
        assert prompt_text(
            server, long_folder, messages=turns, add_generation_prompt=False
        ).endswith("The dog ")


MISSHAPEN = [
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "search"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "code": "x"}}]}, "tools"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [OTHER] * 0, "tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [OTHER], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    (
        {
            "tools": [TOOL],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "tool_choice",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "reasoning": "y"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "messages"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "a",
                            "type": "function",
                            "function": {"name": "f", "arguments": "[1]"},
                        }
                    ],
                }
            ]
        },
        "messages",
    ),
]


@pytest.mark.parametrize(("body", "param"), MISSHAPEN, ids=lambda value: str(value)[:50])
def test_shapes_that_are_refused(server: LocalServer, body: dict[str, Any], param: str) -> None:
    if param == "tool_choice":
        pytest.importorskip("llguidance")
    reply = chat(server, max_tokens=1, **body)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


@needs_grammars
def test_a_bad_schema_of_a_tool_is_the_tools_fault(server: LocalServer) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "no"}}}
    reply = chat(server, tools=[bad], tool_choice="required")
    assert reply.status == 400
    assert reply.json()["error"]["param"] == "tools"
