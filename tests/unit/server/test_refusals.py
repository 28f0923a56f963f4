"""What requests for text are refused for, and ends that are no answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.models import MAX_SEQ_LEN
from support.servers import LocalServer, local_server


def test_ignored_fields_are_named_in_a_header(server: LocalServer) -> None:
    reply = server.complete(prompt="x", max_tokens=1, user="me", metadata={"a": "b"}, store=True)
    assert reply.status == 200
    assert reply.headers["x-llmserve-ignored"] == "user, metadata, store"
    assert "x-llmserve-ignored" not in server.complete(prompt="x", max_tokens=1).headers


def test_unknown_fields_are_refused_or_skipped_where_asked(model_folder: Path) -> None:
    body = {"prompt": "x", "max_tokens": 1, "max_tokns": 3, "x\r\nset-cookie: a": 1}
    with local_server(model_folder, ignore_unknown_fields=True) as lenient:
        reply = lenient.complete(**body)
        assert reply.status == 200
        assert reply.headers["x-llmserve-ignored"] == "max_tokns, and 1 more"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 1),
        ("suffix", None),
        ("length_penalty", 1.0),
        ("use_beam_search", False),
        ("response_format", {"type": "text"}),
        ("skip_special_tokens", True),
        ("logit_bias", None),
        ("stop", None),
        ("stop", []),
        ("max_tokens", None),
        ("logprobs", None),
        ("priority", 0),
        ("cache_salt", None),
        ("prompt_logprobs", None),
        ("allowed_token_ids", None),
        ("banned_token_ids", []),
        ("typical_p", 1),
    ],
)
def test_neutral_values_of_known_fields_are_accepted(
    server: LocalServer, field: str, value: object
) -> None:
    assert server.complete(**{"prompt": "x", "max_tokens": 1, field: value}).status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("best_of", True),
        ("suffix", "end"),
        ("bad_words", ["x"]),
        ("truncate_prompt_tokens", 3),
        ("skip_special_tokens", False),
        ("request_id", "x"),
        ("max_tokns", 3),
        ("messages", []),
    ],
)
def test_fields_that_are_not_served_are_refused_by_name(
    server: LocalServer, field: str, value: object
) -> None:
    reply = server.complete(**{"prompt": "x", "max_tokens": 1, field: value})
    assert reply.status == 400
    assert reply.json()["error"]["param"] == field
    assert field in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "x", "allowed_token_ids": [5], "banned_token_ids": [5]}, "allowed_token_ids"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    server: LocalServer, body: dict[str, object], param: str
) -> None:
    reply = server.complete(**body)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


def test_too_long_a_prompt_names_both_numbers(server: LocalServer) -> None:
    reply = server.complete(prompt=[5] * MAX_SEQ_LEN)
    message = reply.json()["error"]["message"]
    assert reply.status == 400
    assert str(MAX_SEQ_LEN) in message
    assert str(MAX_SEQ_LEN - 1) in message
    reply = server.complete(prompt=[5] * 10, max_tokens=MAX_SEQ_LEN)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == "max_tokens"


def test_a_full_queue_is_429_with_retry_after(model_folder: Path) -> None:
    from llmserve.limits import Limits

    limits = Limits(max_waiting_requests=1)
    with local_server(model_folder, limits=limits, engine={"max_num_seqs": 1}) as server:
        server.loop.call_soon_threadsafe(server.engine.running.clear)
        import threading

        replies: list[int] = []

        def ask() -> None:
            replies.append(server.complete(prompt="x", max_tokens=2).status)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        while server.engine.requests.num_sequences < 2:
            threading.Event().wait(0.001)
        refused = server.complete(prompt="x", max_tokens=2)
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        server.loop.call_soon_threadsafe(server.engine.running.set)
        for thread in threads:
            thread.join()
        assert replies == [200, 200]
        server.wait_idle()


def test_engine_errors_end_replies_of_both_forms(model_folder: Path) -> None:
    with local_server(model_folder, step_s=0.005) as server:

        async def kill_soon() -> None:
            while server.engine.stats is None or server.engine.stats.num_steps < 5:
                await asyncio.sleep(0.001)
            server.engine.lose("test")

        import asyncio

        killing = asyncio.run_coroutine_threadsafe(kill_soon(), server.loop)
        streamed = server.complete(prompt="x", max_tokens=200, stream=True)
        killing.result(5)
        events = streamed.events()
        assert streamed.status == 200
        assert events[-1]["error"]["type"] == "unavailable_error"
        whole = server.complete(prompt="x", max_tokens=200)
        assert whole.status == 503
        assert server.get("/health").status == 503
        assert server.get("/ready").status == 503


def test_a_deadline_ends_the_request(model_folder: Path) -> None:
    from llmserve.limits import Limits

    with local_server(model_folder, step_s=0.02, limits=Limits(max_deadline_s=0.15)) as server:
        whole = server.complete(prompt="x", max_tokens=200)
        assert whole.status == 504
        assert whole.json()["error"]["type"] == "timeout_error"
        events = server.complete(prompt="x", max_tokens=200, stream=True).events()
        assert events[-1]["choices"][0]["finish_reason"] == "timeout"
        server.wait_idle()
