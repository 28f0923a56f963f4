"""R01, R03, R04: bad requests. Whatever is sent, the reply is a 4xx of one small shape, the server
goes on, and exactly what the limits allow is accepted."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from llmserve.limits import Limits
from support.models import make_model_folder
from support.servers import LocalServer, Reply, local_server

VOCAB = 320
LIMITS = Limits()
ROUTES = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "x"},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/v1/classify": {"input": "x"},
    "/v1/answers": {"question": "x", "context": "y"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
GENERATING = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = make_model_folder(tmp_path_factory.mktemp("model") / "tiny")
    # As `llmserve serve` does: what other tests left behind is not searched for garbage while a
    # refusal is timed.
    gc.collect()
    gc.freeze()
    with local_server(folder) as running:
        yield running
        running.wait_idle()
    gc.unfreeze()


RAW = [
    b"", b" ", b"\n\n", b"null", b"true", b"1", b"1.5", b'"text"', b"[]", b"[1,2]", b"[[]]", b"{",
    b"}", b"{}{}", b"{} x", b"{,}", b"{'a':1}", b'{"a"}', b'{"a":}', b'{"a":1,}', b'{"a":01}',
    b'{"a":+1}', b'{"a":.5}', b'{"a":1e}', b'{"a":0x1}', b'{"a":"\n"}', b'{"a":"\\x"}',
    b'{"a":"\\u12"}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":"\\ud800"}',
    b'{"a":"\\udfff\\ud800"}', b'{"\\ud800":1}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}",
    b'{"a":"\xff"}', b'{"a":"\xc0\x80"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xf4\x90\x80\x80"}',
    b'{"a":1,"a":1}', b'{"model":"tiny","model":"tiny"}', b'{"x":{"a":1,"a":1}}',
    b'{"a":' + b"9" * 5000 + b"}", b'{"a":-' + b"9" * 4301 + b"}", b"[" * 100_000,
    b'{"a":' * 50_000, b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", b"<xml/>", b"a=1&b=2", b"\x00",
    b'{"a":1}\x00', b"nul", b"tru", b"-", b"/* */{}", b"{/**/}", b'{"prompt":"x"',
    b'{"prompt":["x"', b'{"prompt":"x"]', b'{"messages":[{"role":"user"}',
    b"\xe2\x80\xa8{}x",
]  # fmt: skip

ODD: list[Any] = [
    True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, -(2**63) - 1, 0.5, -0.5, 1e308,
    1e-320, 7.0, "", "1", "x", "\u0000", [], [1], ["x"], [None], [[]], [{}], {}, {"a": 1},
    {"type": "x"}, [True], [1.5], [2**70], "é" * 50, [[1], ["x"]], {"1": "x"}, {"x": 1},
]  # fmt: skip

FIELDS = [
    "response_format", "structured_outputs", "tools", "tool_choice", "parallel_tool_calls",
    "include_reasoning", "chat_template_kwargs", "continue_final_message", "input", "text_1",
    "text_2", "query", "documents", "top_n", "return_documents", "question", "context",
    "encoding_format", "pooling", "normalize", "max_answer_tokens",
    "model", "max_tokens", "min_tokens", "n", "temperature", "top_k", "top_p", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs",
    "stop", "stop_token_ids", "ignore_eos", "seed", "stream", "stream_options", "prompt",
    "include_stop_str_in_output", "messages", "echo", "add_special_tokens", "tools",
    "max_completion_tokens", "top_logprobs", "add_generation_prompt", "response_format",
    "best_of", "tokens", "return_token_strs", "unknown_field", "typical_p", "allowed_token_ids",
    "banned_token_ids", "prompt_logprobs", "priority", "cache_salt",
]  # fmt: skip

BIG = [
    {"prompt": [1.5] * 60_000},
    {"prompt": [[1]] * 60_000},
    {"prompt": ["x"] * 60_000},
    {"prompt": [True] * 60_000},
    {"prompt": "x" * 900_000},
    {"prompt": [5] * 200_000},
    {"messages": [1] * 100_000},
    {"messages": [{"role": "user", "content": "x"}] * 5_000},
    {"messages": [{"role": "user", "content": [{"type": "text"}] * 5_000}]},
    {"stop": ["x"] * 100_000},
    {"stop": "x" * 500_000},
    {"stop_token_ids": [5] * 100_000},
    {"allowed_token_ids": [5] * 100_000},
    {"banned_token_ids": ["x"] * 100_000},
    {"logit_bias": {str(index): 1 for index in range(50_000)}},
    {"logit_bias": {str(index): "x" for index in range(50_000)}},
    {"tokens": [-1] * 100_000},
    {f"field_{index}": 1 for index in range(50_000)},
    {"stream_options": {f"field_{index}": 1 for index in range(50_000)}},
    {"model": "x" * 500_000},
    {"x" * 500_000: 1},
]


def check_refusal(reply: Reply) -> None:
    assert 400 <= reply.status < 500, reply.body
    assert len(reply.body) <= LIMITS.max_error_bytes
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == reply.status
    assert error["message"]


def check_small_and_below_500(reply: Reply) -> None:
    """Accepted or refused: some odd values are right for some field."""
    if reply.status == 200:
        return
    check_refusal(reply)


def test_bodies_that_are_no_request_are_refused_everywhere(server: LocalServer) -> None:
    for route, body in product(ROUTES, RAW):
        started = time.process_time()
        check_refusal(server.post(route, body))
        assert time.process_time() - started < 1.0, body[:40]
    assert server.get("/health").status == 200


@pytest.mark.parametrize("route", ROUTES)
def test_odd_values_of_every_field_never_reach_500(server: LocalServer, route: str) -> None:
    count = 0
    for field, value in product(FIELDS, ODD):
        check_small_and_below_500(server.post(route, {**ROUTES[route], field: value}))
        count += 1
    assert count >= 300
    server.wait_idle()
    assert server.get("/health").status == 200


@pytest.mark.parametrize("route", ROUTES)
def test_large_wrong_bodies_are_cheap_to_refuse(server: LocalServer, route: str) -> None:
    for change in BIG:
        body = {**ROUTES[route], **change}
        started = time.process_time()
        reply = server.post(route, body)
        if route == "/tokenize" and reply.status == 200:
            continue  # a long prompt is no wrong one there
        check_refusal(reply)
        assert time.process_time() - started < 2.0, next(iter(change))[:40]


def test_an_odd_value_in_each_message_field_is_refused(server: LocalServer) -> None:
    for field, value in product(("role", "content", "name", "tool_calls", "x"), ODD):
        message = {"role": "user", "content": "x", field: value}
        body = {"messages": [message], "max_tokens": 1}
        check_small_and_below_500(server.post("/v1/chat/completions", body))
    for part in ODD:
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        check_refusal(server.post("/v1/chat/completions", body))


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_bodies_that_do_not_say_json_are_refused(server: LocalServer, content_type: str) -> None:
    for route, body in ROUTES.items():
        reply = server.post(route, body, content_type=content_type)
        assert reply.status == 415
        check_refusal(reply)
    charset = "application/json; charset=utf-8"
    assert server.post("/tokenize", {"prompt": "x"}, content_type=charset).status == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "HEAD", "GET", "TRACE", "BREW"])
def test_other_methods_are_405(server: LocalServer, method: str) -> None:
    from support.servers import call

    for route in ROUTES:
        reply = server.run(call(server.app, method, route, b"{}"))
        assert reply.status == 405
        if method != "HEAD":
            check_refusal(reply)


# Field → (accepted values, refused values), at, inside and beyond the bounds.
BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "max_tokens": ([1, 2, 100], [0, -1, 257, 2**31]),
    "min_tokens": ([0, 1], [-1, 2, 2**31]),
    "n": ([1, LIMITS.max_choices], [0, -1, LIMITS.max_choices + 1, 10**9]),
    "temperature": ([0, 0.5, 100, 1e-320], [-0.001, 100.001, 1e400]),
    "top_k": ([-1, 0, 1, VOCAB, VOCAB + 1], [-2, 2**31]),
    "top_p": ([1e-9, 0.5, 1], [0, -0.1, 1.001]),
    "min_p": ([0, 0.5, 1], [-0.001, 1.001]),
    "typical_p": ([1e-9, 0.5, 1], [0, -0.1, 1.001]),
    "presence_penalty": ([-2, 0, 2], [-2.001, 2.001]),
    "frequency_penalty": ([-2, 0, 2], [-2.001, 2.001]),
    "repetition_penalty": ([1e-9, 1, 10], [0, -1, 10.001]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "stop": (
        ["x", ["x"] * LIMITS.max_stop_strings, "x" * LIMITS.max_stop_chars],
        ["", [""], ["x"] * (LIMITS.max_stop_strings + 1), "x" * (LIMITS.max_stop_chars + 1)],
    ),
    "stop_token_ids": (
        [[], [5] * LIMITS.max_stop_token_ids],
        [[5] * (LIMITS.max_stop_token_ids + 1)],
    ),
    "allowed_token_ids": (
        [[5], [5] * LIMITS.max_allowed_token_ids],
        [[], [VOCAB], [-1], [5] * (LIMITS.max_allowed_token_ids + 1)],
    ),
    "banned_token_ids": (
        [[], [5] * LIMITS.max_banned_token_ids],
        [[VOCAB], [-1], [5] * (LIMITS.max_banned_token_ids + 1)],
    ),
    "priority": ([0], [1, -1, 2**31, -(2**31) - 1]),
    "cache_salt": (["", "x", "x" * 100_000], [5, ["x"]]),
    "logit_bias": (
        [{}, {"5": -100}, {"5": 100}, {str(i): 1 for i in range(LIMITS.max_logit_bias)}],
        [{"5": -100.1}, {"5": 100.1}, {str(i): 1 for i in range(LIMITS.max_logit_bias + 1)}],
    ),
}  # fmt: skip
ONE_ROUTE: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("/v1/completions", "logprobs"): (
        [0, LIMITS.max_logprobs],
        [-1, LIMITS.max_logprobs + 1],
    ),
    ("/v1/completions", "prompt_logprobs"): (
        [0, LIMITS.max_logprobs],
        [-1, LIMITS.max_logprobs + 1],
    ),
    ("/v1/completions", "prompt"): (
        [["x"] * LIMITS.max_prompts, [5] * 255, [[5]] * LIMITS.max_prompts],
        [["x"] * (LIMITS.max_prompts + 1), [5] * 256, [], [[]]],
    ),
    ("/v1/chat/completions", "max_completion_tokens"): ([1], [0, 2, 2**31]),
    ("/v1/chat/completions", "messages"): (
        [[{"role": "user", "content": ""}] * 10],
        [[], [{"role": "user", "content": "x"}] * (LIMITS.max_messages + 1)],
    ),
}


@pytest.mark.parametrize("route", GENERATING)
@pytest.mark.parametrize("field", BOUNDS)
def test_bounds_are_exact(server: LocalServer, route: str, field: str) -> None:
    base = {**ROUTES[route], "temperature": 0}
    accepted, refused = BOUNDS[field]
    for value in accepted:
        reply = server.post(route, {**base, field: value})
        assert reply.status == 200, (field, value, reply.body)
    for value in refused:
        data = json.dumps({**base, field: value}).replace("Infinity", "1e400").encode()
        reply = server.post(route, data)
        check_refusal(reply)
        assert reply.json()["error"]["param"] in (field, "min_tokens"), reply.body


@pytest.mark.parametrize(("route", "field"), ONE_ROUTE)
def test_bounds_of_single_routes_are_exact(server: LocalServer, route: str, field: str) -> None:
    accepted, refused = ONE_ROUTE[route, field]
    for value in accepted:
        assert server.post(route, {**ROUTES[route], field: value}).status == 200, (field, value)
    for value in refused:
        check_refusal(server.post(route, {**ROUTES[route], field: value}))


def test_choices_times_prompts_are_bounded(server: LocalServer) -> None:
    at = {"prompt": ["x"] * 8, "n": 16, "max_tokens": 1}
    assert len(server.complete(**at).json()["choices"]) == LIMITS.max_sequences_per_request
    reply = server.complete(**{**at, "prompt": ["x"] * 9})
    check_refusal(reply)
    assert reply.json()["error"]["param"] == "n"


def test_top_logprobs_are_bounded(server: LocalServer) -> None:
    body = {**ROUTES["/v1/chat/completions"], "logprobs": True}
    most = LIMITS.max_logprobs
    assert server.post("/v1/chat/completions", {**body, "top_logprobs": most}).status == 200
    for value in (-1, most + 1):
        check_refusal(server.post("/v1/chat/completions", {**body, "top_logprobs": value}))


def test_only_ids_of_the_vocabulary_are_accepted_and_neighbours_unharmed(
    server: LocalServer,
) -> None:
    control = server.complete(prompt=[7, 8, 9], max_tokens=20).json()["choices"]
    for token_id in (-1, VOCAB - 1, VOCAB, 2**31, 2**63):
        expected = 200 if token_id == VOCAB - 1 else 400
        for body in (
            {"prompt": [token_id]},
            {"prompt": [[5], [5, token_id]]},
            {"prompt": "x", "stop_token_ids": [token_id]},
            {"prompt": "x", "logit_bias": {str(token_id): 1}},
            {"prompt": "x", "allowed_token_ids": [token_id]},
            {"prompt": "x", "banned_token_ids": [token_id]},
        ):
            reply = server.complete(max_tokens=2, **body)
            assert reply.status == expected, (token_id, body, reply.body)
        assert server.post("/detokenize", {"tokens": [token_id]}).status == expected
    assert server.complete(prompt=[7, 8, 9], max_tokens=20).json()["choices"] == control
