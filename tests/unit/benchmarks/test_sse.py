from __future__ import annotations

import pytest

from llmserve.benchmarks.sse import ServerEvent, SSEError, SSEParser


def parse(*chunks: bytes) -> list[ServerEvent]:
    parser = SSEParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_event_is_given_as_soon_as_its_blank_line_ends() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: {}\n") == []
    assert parser.feed(b"\n") == [ServerEvent(b"{}")]


def test_several_events_in_one_chunk_come_in_order() -> None:
    events = parse(b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n")
    assert [event.data for event in events] == [b"1", b"2", b"[DONE]"]


def test_comments_and_unknown_fields_are_skipped() -> None:
    assert parse(b": ping\n\nid: 7\nretry: 10\n<html>\ndata: x\n\n") == [ServerEvent(b"x")]


def test_data_lines_of_one_event_are_joined() -> None:
    assert parse(b"data: a\ndata\ndata:b\n\n") == [ServerEvent(b"a\n\nb")]


def test_event_name_belongs_to_its_event_only() -> None:
    events = parse(b"event: error\ndata: 1\n\ndata: 2\n\n")
    assert [event.name for event in events] == [b"error", b"message"]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_every_line_ending_is_one(newline: bytes) -> None:
    stream = newline.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    assert parse(stream) == [ServerEvent(b"a\nb"), ServerEvent(b"c")]


def test_carriage_return_and_line_feed_in_two_chunks_are_one_ending() -> None:
    assert parse(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [ServerEvent(b"a\nb")]


def test_byte_order_mark_is_dropped_at_the_start_only() -> None:
    events = parse(b"\xef", b"\xbb\xbfdata: a\n\n", b"\xef\xbb\xbfdata: b\n\ndata: c\n\n")
    assert [event.data for event in events] == [b"a", b"c"]


def test_unfinished_event_is_not_one() -> None:
    assert parse(b"data: a\n\ndata: b\n") == [ServerEvent(b"a")]


@pytest.mark.parametrize("chunk", [b"x" * 64, b"data: xxxxxxxx\n"])
def test_event_that_never_ends_is_an_error(chunk: bytes) -> None:
    parser = SSEParser(max_event_bytes=1000)
    fits = 1000 // len(chunk)
    for _ in range(fits):
        parser.feed(chunk)
    with pytest.raises(SSEError, match="1000 bytes"):
        parser.feed(chunk * fits)
