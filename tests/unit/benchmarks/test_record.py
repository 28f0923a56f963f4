from __future__ import annotations

import json

import pytest

from llmserve.benchmarks.record import RequestRecord, apply_event
from llmserve.benchmarks.sse import ServerEvent


def record_of(*chunks: object, times: list[float] | None = None) -> RequestRecord:
    """A closed record of a stream of these JSON values; strings are sent as they are."""
    record = RequestRecord(index=0)
    for number, chunk in enumerate(chunks):
        data = chunk if isinstance(chunk, str) else json.dumps(chunk)
        apply_event(record, ServerEvent(data.encode()), times[number] if times else float(number))
    record.close()
    return record


def text(piece: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": finish_reason}]}


def delta(finish_reason: str | None = None, **fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def usage(prompt: object, completion: object) -> dict[str, object]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"choices": [], "usage": counts}


def test_completion_stream_gives_text_times_and_counts() -> None:
    record = record_of(text("a"), text(""), text("b", "length"), usage(5, 3), "[DONE]")
    assert record.is_success
    assert record.is_done
    assert "".join(record.texts) == "ab"
    assert record.chunk_times_s == [0.0, 1.0, 2.0]
    assert (record.prompt_tokens, record.output_tokens) == (5, 3)


def test_latency_ends_at_the_last_token_chunk_not_at_done() -> None:
    record = record_of(text("a"), text("b", "stop"), usage(1, 2), "[DONE]", times=[1.0, 2.5, 8, 9])
    assert record.e2e_s == 2.5


def test_times_count_from_the_intended_send() -> None:
    record = record_of(text("a"), text("b", "stop"), times=[10.0, 12.0])
    record.origin_s, record.sent_s = 4.0, 7.0
    assert (record.ttft_s, record.e2e_s, record.client_queue_s) == (6.0, 8.0, 3.0)


def test_several_tokens_in_a_chunk_count_by_usage() -> None:
    record = record_of(text("abc"), text("def", "length"), usage(1, 7), times=[1.0, 4.0, 4.0])
    assert record.output_tokens == 7
    assert record.chunk_tokens == [3, 4]
    assert record.itls_s == [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    assert record.tpot_s == pytest.approx(3.0 / 6)


def test_tokens_of_a_chunk_are_as_the_server_tells() -> None:
    """By the usage so far, by ids or by log-probabilities; a chunk without a token has no gap."""
    by_usage = record_of(
        {**text("a"), "usage": {"completion_tokens": 1}},
        {**text("bcd"), "usage": {"completion_tokens": 4}},
        {**text("", "stop"), "usage": {"completion_tokens": 4}},
        times=[1.0, 3.0, 9.0],
    )
    assert by_usage.is_told
    assert by_usage.chunk_tokens == [1, 3, 0]
    assert by_usage.itls_s == [2.0, 0.0, 0.0]

    def choice(piece: str, finish_reason: str | None = None, **fields: object) -> object:
        return {"choices": [{"text": piece, "finish_reason": finish_reason, **fields}]}

    by_ids = record_of(
        choice("ab", token_ids=[7, 8]), choice("c", "stop", token_ids=[9]), usage(1, 3)
    )
    assert by_ids.chunk_tokens == [2, 1]
    by_logprobs = record_of(
        choice("ab", logprobs={"tokens": ["a", "b"]}),
        choice("c", "stop", logprobs={"content": [{}]}),
        usage(1, 3),
    )
    assert (by_logprobs.is_told, by_logprobs.chunk_tokens) == (True, [2, 1])


def test_total_told_with_the_last_token_is_not_that_chunks() -> None:
    record = record_of(text("a"), {**text("b", "stop"), "usage": {"completion_tokens": 4}})
    assert (record.is_told, record.chunk_tokens) == (False, [2, 2])


def test_chunk_beyond_the_servers_count_holds_no_token() -> None:
    record = record_of(text("a"), text("b"), text("", "stop"), usage(1, 2), times=[1, 2, 5, 5])
    assert record.chunk_tokens == [1, 1, 0]
    assert record.itls_s == [1]


def test_chunks_count_as_tokens_when_the_server_does_not_count() -> None:
    assert record_of(text("a"), text("b", "stop")).output_tokens == 2


@pytest.mark.parametrize("count", [-1, True, "3", None, 2.0])
def test_usage_that_is_no_count_is_not_taken(count: object) -> None:
    record = record_of(text("a", "stop"), usage(count, count))
    assert (record.prompt_tokens, record.completion_tokens) == (None, None)


def test_one_token_has_no_time_per_further_token() -> None:
    assert record_of(text("a", "stop"), usage(1, 1)).tpot_s is None


def test_chat_chunk_that_announces_the_role_is_no_token() -> None:
    record = record_of(
        delta(role="assistant", content=""), delta(content="Hi"), delta("stop"), times=[1, 2, 3]
    )
    assert record.is_success
    assert record.chunk_times_s == [2, 3]
    assert record.texts == ["Hi"]


def test_role_together_with_text_is_a_token() -> None:
    assert record_of(delta("stop", role="assistant", content="Hi")).chunk_times_s == [0.0]


def test_reasoning_and_tool_calls_are_tokens() -> None:
    record = record_of(delta(reasoning="hm"), delta(role="assistant", tool_calls=[{}]), "[DONE]")
    assert len(record.chunk_times_s) == 2
    assert record.texts == ["hm"]


@pytest.mark.parametrize(
    ("chunks", "kind", "message"),
    [
        (["<html>"], "garbage", "not JSON: '<html>'"),
        (['{"choices": NaN}'], "garbage", "not JSON"),
        ([[1]], "garbage", "no JSON object"),
        ([{"choices": 3}], "garbage", "not a list"),
        ([{"choices": ["x"]}], "garbage", "not a list"),
        ([usage(1, 0), "[DONE]"], "garbage", "no event with a token"),
        ([], "garbage", "no event with a token"),
        ([text("a"), {"error": {"message": "out of memory"}}], "server", "out of memory"),
        ([text("a"), {"error": "bad"}], "server", "bad"),
        ([text("a", "error"), "[DONE]"], "server", "'error'"),
        ([text("a", "timeout")], "server", "'timeout'"),
        ([text("a"), text("b")], "incomplete", "after 2 chunks"),
    ],
)
def test_failure_is_named_by_kind(chunks: list[object], kind: str, message: str) -> None:
    record = record_of(*chunks)
    assert record.error_kind == kind
    assert message in record.error


def test_error_event_by_name_is_a_server_error() -> None:
    record = RequestRecord(index=0)
    apply_event(record, ServerEvent(b'{"message": "gone"}', b"error"), 0.0)
    assert (record.error_kind, record.error) == ("server", "gone")


def test_first_failure_stands() -> None:
    record = RequestRecord(index=0)
    record.fail("timeout", "first")
    record.close()
    assert (record.error_kind, record.error) == ("timeout", "first")
