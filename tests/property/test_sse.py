"""The events of a stream do not depend on where the network cut it."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llmserve.benchmarks.sse import ServerEvent, SSEParser

PIECES = [
    b"data: ", b"data:", b"data", b"event: error", b"event", b": ping", b"id: 1", b" ", b":",
    b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n",
    b'{"a":1}', b"[DONE]", b"\xef\xbb\xbf", "é€".encode(),
]  # fmt: skip

streams = st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=40).map(b"".join)


def whole_stream_events(stream: bytes) -> list[ServerEvent]:
    """The standard's algorithm over all lines at once."""
    lines = re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]
    events, data, name = [], [], b""
    for line in lines:
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if line == b"":
            if data:
                events.append(ServerEvent(b"\n".join(data), name or b"message"))
            data, name = [], b""
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return events


@given(streams, st.data())
def test_any_chunking_gives_the_events_of_the_whole(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    edges = [0, *cuts, len(stream)]
    parser = SSEParser()
    events = []
    for start, end in pairwise(edges):
        events += parser.feed(stream[start:end])
    assert events == whole_stream_events(stream)


@given(streams)
def test_single_bytes_give_the_events_of_the_whole(stream: bytes) -> None:
    parser = SSEParser()
    events = [event for byte in stream for event in parser.feed(bytes([byte]))]
    assert events == whole_stream_events(stream)
