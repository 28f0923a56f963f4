"""What goes between the ranks, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest

from llmserve.errors import EngineError
from llmserve.runners.protocol import Batch
from llmserve.runners.rank_messages import (
    Allocate,
    Failed,
    Load,
    Loaded,
    Logits,
    Meet,
    StreamEndError,
    batch_of,
    encode,
    receive_command,
    receive_event,
    step_of,
)
from support.batches import Share, make_batch, make_row

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def make_step(adapter_id: int) -> Batch:
    shares = [
        Share(
            token_ids=[7], first=20, tables=[[3, 1], [5, 2]], rows=[make_row([7])],
            adapter_id=adapter_id,
        ),
        Share(token_ids=[4, 5, 6], tables=[[0], [4]], rows=[make_row([4])]),
    ]  # fmt: skip
    return make_batch(shares, block_size=16, copies=[[(0, 2)], []])


@pytest.mark.parametrize("adapter_id", [0, 2])
def test_a_step_arrives_as_it_was(pair: Pair, adapter_id: int) -> None:
    batch = make_step(adapter_id)
    pair[0].sendall(encode(step_of(batch)))
    found = batch_of(receive_command(pair[1]))  # type: ignore[arg-type]
    for name in ("token_ids", "positions", "cu_seqlens", "context_lens", "adapter_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(batch, name), err_msg=name)
    for ours, theirs in zip(batch.groups, found.groups, strict=True):
        for field in fields(ours):
            value = getattr(theirs, field.name)
            np.testing.assert_array_equal(value, getattr(ours, field.name))
            assert value.shape == getattr(ours, field.name).shape
            assert value.flags.writeable, "torch takes no other"
    assert not found.sampling
    assert not len(found.logits_indices)


def test_commands_and_events_follow_each_other(pair: Pair) -> None:
    load = Load(
        folder="f",
        rank=1,
        count=2,
        dtype=None,
        cache_dtype="auto",
        device="cpu",
        threads=1,
        adapters={"a": "b"},
    )
    commands = [load, Meet("m", 1.5), Allocate((4, 2), 16), Logits(3)]
    pair[0].sendall(b"".join(map(encode, commands)))
    assert [receive_command(pair[1]) for _ in commands] == commands
    events = [Loaded("print", 12), Failed("why")]
    pair[1].sendall(b"".join(map(encode, events)))
    assert [receive_event(pair[0]) for _ in events] == events


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (encode(Failed("an event")), "could not be read"),
        ((3).to_bytes(8, "big") + b"\xc1\xc1\xc1", "could not be read"),
        ((1 << 40).to_bytes(8, "big"), "a frame of 1099511627776 bytes"),
    ],
)
def test_what_is_no_command_is_an_error(pair: Pair, sent: bytes, message: str) -> None:
    pair[0].sendall(sent)
    with pytest.raises(EngineError, match=message):
        receive_command(pair[1])


@pytest.mark.parametrize("sent", [b"", b"\0\0", (8).to_bytes(8, "big") + b"half"])
def test_the_end_of_the_stream_is_told_apart(pair: Pair, sent: bytes) -> None:
    pair[0].sendall(sent)
    pair[0].close()
    with pytest.raises(StreamEndError):
        receive_command(pair[1])


def test_an_event_is_waited_for_as_long_as_was_said(pair: Pair) -> None:
    pair[0].settimeout(0.01)
    with pytest.raises(TimeoutError):
        receive_event(pair[0])
