"""Every field that completions take, on a real model: it changes the answer, or is refused.

The names come from the schema, so that a new field fails here until somebody shows what it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.llm import LLM
from llmserve.sampling import SamplingParams
from llmserve.server.schemas import CompletionRequest
from support.adapter_folders import make_adapter_folder
from support.models import make_model_folder
from support.servers import LocalServer, local_server

SAMPLED = {"prompt": "Once upon a time", "max_tokens": 24, "seed": 5, "temperature": 1.0}
GREEDY = {**SAMPLED, "temperature": 0.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    root = tmp_path_factory.mktemp("model")
    folder = make_model_folder(root / "tiny")
    adapter = make_adapter_folder(root / "tuned", Checkpoint.open(folder).config)
    engine = {"runner": "torch", "policy": "priority", "adapters": {"tuned": str(adapter)}}
    with local_server(folder, engine=engine) as running:
        yield running
        running.wait_idle()


# Field → the rest of the request, and a value that changes its answer.
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt": (GREEDY, "She saw"),
    "max_tokens": (GREEDY, 5),
    "n": (SAMPLED, 2),
    "temperature": (SAMPLED, 3.0),
    "top_k": (SAMPLED, 1),
    "top_p": (SAMPLED, 0.05),
    "min_p": (SAMPLED, 0.9),
    "typical_p": (SAMPLED, 0.05),
    "presence_penalty": (GREEDY, 2.0),
    "frequency_penalty": (GREEDY, 2.0),
    "repetition_penalty": (GREEDY, 5.0),
    "logit_bias": (GREEDY, {"70": 100}),
    "allowed_token_ids": (GREEDY, [70, 71]),
    "seed": (SAMPLED, 6),
    "logprobs": (GREEDY, 2),
    "prompt_logprobs": (GREEDY, 2),
    "echo": (GREEDY, True),
}


def told(server: LocalServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = server.post("/v1/completions", body)
    assert reply.status == 200, reply.body
    return reply.json()["choices"]


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_the_answer(server: LocalServer, field: str) -> None:
    body, value = CHANGES[field]
    before = told(server, body)
    assert told(server, body) == before, "the answer varies by itself"
    assert told(server, {**body, field: value}) != before


def test_fields_about_ends_change_where_the_text_ends(server: LocalServer) -> None:
    text = told(server, GREEDY)[0]["text"]
    stop = text[4:7]
    (ended,) = told(server, {**GREEDY, "stop": stop})
    assert (ended["text"], ended["stop_reason"]) == (text[: text.index(stop)], stop)
    (kept,) = told(server, {**GREEDY, "stop": stop, "include_stop_str_in_output": True})
    assert kept["text"] == ended["text"] + stop
    bias = {"logit_bias": {"70": 100}}
    (by_id,) = told(server, {**GREEDY, **bias, "stop_token_ids": [70]})
    assert (by_id["finish_reason"], by_id["stop_reason"]) == ("stop", 70)
    (later,) = told(server, {**GREEDY, **bias, "stop_token_ids": [70], "min_tokens": 3})
    assert len(later["text"]) > len(by_id["text"])
    end = {"logit_bias": {"0": 100}}
    assert told(server, {**GREEDY, **end})[0]["finish_reason"] == "stop"
    assert told(server, {**GREEDY, **end, "ignore_eos": True})[0]["finish_reason"] == "length"
    banned = {**GREEDY, **end, "banned_token_ids": [0]}
    assert told(server, banned)[0]["finish_reason"] == "length"


def test_fields_about_the_way_change_the_way(server: LocalServer) -> None:
    for field, value in (
        ("model", "another"),
        ("stream_options", {"include_usage": True}),
        ("priority", 2**40),
    ):
        reply = server.post("/v1/completions", {**GREEDY, field: value})
        assert 400 <= reply.status < 500, field
        assert reply.json()["error"]["param"] == field
    assert server.post("/v1/completions", {**GREEDY, "stream": True}).events()
    bos = server.service.tokenizer.encode("x", add_special_tokens=True)
    without = server.service.tokenizer.encode("x", add_special_tokens=False)
    usage = server.post("/v1/completions", {**GREEDY, "prompt": "x"}).json()["usage"]
    assert usage["prompt_tokens"] == len(bos)
    bare = {**GREEDY, "prompt": "x", "add_special_tokens": False}
    assert server.post("/v1/completions", bare).json()["usage"]["prompt_tokens"] == len(without)

    def hits(**fields: str) -> int:
        body = {**GREEDY, "prompt": "a salted prompt of some length" * 2, **fields}
        details = server.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]
        return details["cached_tokens"]

    assert hits() == 0
    assert hits() > 0
    assert hits(cache_salt="mine") == 0


def test_the_model_named_is_the_one_that_answers(server: LocalServer) -> None:
    (card,) = server.service.model.adapter_cards
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(server.service.card.root, adapters={"tuned": card.root}) as llm:
        expected = [
            llm.generate([GREEDY["prompt"]], params, adapter=name)[0].text
            for name in (None, "tuned")
        ]
    assert expected[0] != expected[1]
    body = {**GREEDY, "ignore_eos": True}
    assert [told(server, {**body, "model": name})[0]["text"] for name in ("tiny", "tuned")] == (
        expected
    )


def test_no_field_is_left_out() -> None:
    elsewhere = {
        "stop", "include_stop_str_in_output", "stop_token_ids", "min_tokens", "ignore_eos",
        "banned_token_ids", "model", "stream", "stream_options", "priority", "cache_salt",
        "add_special_tokens", "response_format", "structured_outputs", "timing",
    }  # fmt: skip
    assert CompletionRequest.model_fields.keys() == CHANGES.keys() | elsewhere


def test_echoed_logprobs_are_those_of_generating(server: LocalServer) -> None:
    """As lm-eval scores texts: a prompt's tokens are as likely as they were when generated."""
    prompt = [5, 9, 70]
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True)
    with LLM(server.service.card.root, cache_bytes=1 << 20) as llm:
        (choice,) = llm.generate([prompt], params)[0].choices
    ids = [*prompt, *choice.token_ids]
    body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}
    lists = told(server, body)[0]["logprobs"]
    texts = [server.service.tokenizer.token_text(token_id) for token_id in ids]
    assert lists["tokens"] == texts
    expected = [entry.logprob for entry in choice.logprobs]
    assert lists["token_logprobs"][3:] == pytest.approx(expected, abs=1e-4)
    assert [list(top) for top in lists["top_logprobs"][3:]] == [[text] for text in texts[3:]]
