"""The Responses and Messages routes: the chat route's text in other shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from llmserve.limits import Limits
from llmserve.runners.protocol import SamplingRow
from llmserve.server.error_replies import error_body
from llmserve.server.message_parts import MessageParser
from llmserve.server.messages_api_reply import MessagesFormat
from llmserve.server.replies import ReplyHead
from llmserve.server.responses_reply import ResponsesFormat
from llmserve.text.tokenizer import Tokenizer
from support.servers import LocalServer, Reply, local_server

ANSWER = "she saw a dog"
HELLO = "hello"


@pytest.fixture(scope="module")
def speller(model_folder: Path) -> Iterator[LocalServer]:
    """A server whose model always writes the same sentence, then ends."""
    ids = Tokenizer.load(model_folder).encode(ANSWER, add_special_tokens=False)

    def script(row: SamplingRow) -> int:
        made = len(row.token_ids) - row.num_prompt_tokens
        return ids[made] if made < len(ids) else 0

    with local_server(model_folder, script=script) as server:
        yield server


def respond(server: LocalServer, **body: Any) -> Reply:
    return server.post("/v1/responses", {"input": HELLO, **body})


def message(server: LocalServer, **body: Any) -> Reply:
    turns = [{"role": "user", "content": HELLO}]
    return server.post("/v1/messages", {"messages": turns, "max_tokens": 50, **body})


def events(reply: Reply) -> list[tuple[str, dict[str, Any]]]:
    """Names and payloads of a stream's events; each payload repeats its name."""
    assert reply.status == 200, reply.body
    found = []
    for block in reply.body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert payload["type"] == name.removeprefix("event: ")
        found.append((payload["type"], payload))
    return found


def test_response_is_the_chat_routes_answer(speller: LocalServer) -> None:
    body = respond(speller, instructions="Be kind.", max_output_tokens=50).json()
    assert (body["object"], body["status"], body["incomplete_details"]) == (
        "response", "completed", None,
    )  # fmt: skip
    (item,) = body["output"]
    assert item["content"][0]["text"] == ANSWER
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": HELLO}]
    usage = speller.post("/v1/chat/completions", {"messages": turns}).json()["usage"]
    assert body["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert body["usage"]["total_tokens"] == usage["total_tokens"]
    short = respond(speller, max_output_tokens=2).json()
    assert (short["status"], short["incomplete_details"]["reason"]) == (
        "incomplete", "max_output_tokens",
    )  # fmt: skip


def test_stream_of_a_response_in_the_order_that_clients_expect(speller: LocalServer) -> None:
    found = events(respond(speller, stream=True))
    names = [name for name, _ in found]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event["delta"] for name, event in found if name == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER
    assert len(deltas) > 3
    assert [event["sequence_number"] for _, event in found] == list(range(len(found)))
    assert found[-1][1]["response"]["output"][0]["content"][0]["text"] == ANSWER


def test_the_official_client_reads_both(speller: LocalServer) -> None:
    with speller.listening() as (host, port):
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
        response = client.responses.create(model="tiny", input=HELLO)
        assert response.output_text == ANSWER
        conversation: Any = [
            {"role": "user", "content": [{"type": "input_text", "text": HELLO}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "hi"}]},
            {"type": "message", "role": "user", "content": "more"},
        ]
        with client.responses.stream(model="tiny", input=conversation) as stream:
            text = "".join(
                event.delta for event in stream if event.type == "response.output_text.delta"
            )
            assert text == stream.get_final_response().output_text == ANSWER
        client.close()


def test_message_and_its_stop_reasons(speller: LocalServer) -> None:
    body = message(speller, system=[{"type": "text", "text": "Be kind."}]).json()
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    assert body["content"] == [{"type": "text", "text": ANSWER}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"]["output_tokens"] > 3
    assert message(speller, max_tokens=2).json()["stop_reason"] == "max_tokens"
    stopped = message(speller, stop_sequences=["dog"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "dog")
    assert stopped["content"][0]["text"] == ANSWER.removesuffix("dog")


def test_stream_of_a_message(speller: LocalServer) -> None:
    found = events(message(speller, stream=True))
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert found[0][1]["message"]["usage"]["input_tokens"] > 0
    deltas = [event["delta"]["text"] for name, event in found if name == "content_block_delta"]
    assert "".join(deltas) == ANSWER
    assert found[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_a_begun_answer_is_gone_on_with(server: LocalServer) -> None:
    turns = [{"role": "user", "content": HELLO}, {"role": "assistant", "content": "The dog"}]
    body = message(server, messages=turns, max_tokens=1).json()
    whole = server.post("/tokenize", {"prompt": f"<user>{HELLO}\n<assistant>The dog"}).json()
    # The tokenizer's own first token is not part of a conversation's prompt.
    assert body["usage"]["input_tokens"] in (whole["count"], whole["count"] - 1)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("responses", {"input": ""}, "input"),
        ("responses", {"input": [{"type": "image", "role": "user"}]}, "input"),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
        ),
        ("responses", {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ("responses", {"input": "x", "text": {"format": {"type": "yaml"}}}, "response_format"),
        ("messages", {"messages": [], "max_tokens": 1}, "messages"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "max_tokens"),
        (
            "messages",
            {"messages": [{"role": "system", "content": "x"}], "max_tokens": 1},
            "messages",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "temperature": 2.0},
            "temperature",
        ),
    ],
)
def test_what_is_refused(server: LocalServer, route: str, body: dict[str, Any], param: str) -> None:
    reply = server.post(f"/v1/{route}", body)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


def test_an_error_after_the_stream_began_is_one_event() -> None:
    head = ReplyHead(request_id="1", model="m", system_fingerprint="f")
    body = error_body(Limits(), 500, "broke")
    for reply in (
        ResponsesFormat(head, MessageParser(), {}),
        MessagesFormat(head, MessageParser(), num_prompt_tokens=1),
    ):
        ((name, event),) = events(Reply(200, {}, reply.failure(body)))
        assert name == "error"
        assert "broke" in (event.get("message"), event.get("error", {}).get("message"))
