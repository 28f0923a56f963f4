"""The engine process' loop, run in a thread over a real socket pair."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmserve import failpoints
from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.errors import LLMServeError
from llmserve.failpoints import FailpointError
from llmserve.server.engine_process import (
    Channel,
    EngineLoop,
    FreshRequests,
    ParentGoneError,
)
from llmserve.server.messages import (
    Abort,
    AddRequest,
    Command,
    Computing,
    Event,
    Finish,
    Outputs,
    encode_frame,
    event_decoder,
)
from support.engines import expected, make_engine, make_request, tokens_by_choice


class Parent:
    """The other end: sends commands, collects events."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = event_decoder()
        self.events: list[Event] = []

    def send(self, *commands: Command) -> None:
        self._connection.sendall(b"".join(map(encode_frame, commands)))

    def receive(self) -> bool:
        """One more piece of what was sent; False at the end."""
        data = self._connection.recv(65536)
        self.events += self._decoder.feed(data)
        return bool(data)

    @property
    def outputs(self) -> list[RequestOutput]:
        return [out for event in self.events if isinstance(event, Outputs) for out in event.outputs]

    def wait_for_ends(self, count: int) -> list[RequestOutput]:
        """All outputs, once `count` choices have ended."""
        while sum(out.finish_reason is not None for out in self.outputs) < count:
            assert self.receive(), "the engine ended"
        return self.outputs


@contextmanager
def running_loop() -> Iterator[tuple[Parent, list[BaseException]]]:
    """A loop over the scripted runner, and what it ended with."""
    ours, theirs = socket.socketpair()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            channel = Channel(theirs)
            fresh = FreshRequests(channel)
            EngineLoop(make_engine(watcher=fresh), channel, fresh).run()
        except LLMServeError as error:
            raised.append(error)
        theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    ours.settimeout(10)
    try:
        yield Parent(ours), raised
    finally:
        failpoints.disarm_all()
        ours.close()
        thread.join(10)
        assert not thread.is_alive()


def test_requests_are_answered_and_the_end_of_the_parent_is_the_end() -> None:
    with running_loop() as (parent, raised):
        parent.send(*(AddRequest(make_request(f"r{i}", [i, 1, 2], max_tokens=6)) for i in range(4)))
        tokens = tokens_by_choice(parent.wait_for_ends(4))
        assert tokens == {(f"r{i}", 0): expected([i, 1, 2], 6) for i in range(4)}
        statistics = [event.stats for event in parent.events if isinstance(event, Outputs)]
        assert statistics[-1].num_running == 0
    assert isinstance(raised[0], ParentGoneError)


def test_abort_and_finish_reach_the_engine() -> None:
    with running_loop() as (parent, _):
        parent.send(
            AddRequest(make_request("a", [1], max_tokens=120)),
            AddRequest(make_request("b", [2], max_tokens=120, n=2)),
            Abort("a"),
            Finish("b", 0),
            Abort("unknown"),
        )
        ends = [out for out in parent.wait_for_ends(2) if out.finish_reason is not None]
        assert {(out.request_id, out.choice_index, out.finish_reason) for out in ends} == {
            ("a", 0, FinishReason.ABORT),
            ("b", 1, FinishReason.LENGTH),
        }


def test_a_request_that_cannot_be_served_ends_as_error() -> None:
    with running_loop() as (parent, _):
        parent.send(AddRequest(make_request("a", [1] * 500, n=2)))
        outputs = parent.wait_for_ends(2)
        assert all(out.finish_reason is FinishReason.ERROR for out in outputs)
        assert "500 tokens" in str(outputs[0].error)


def test_a_step_that_raises_ends_the_loop() -> None:
    with running_loop() as (parent, raised):
        failpoints.arm("engine.forward=raise@3")
        parent.send(AddRequest(make_request("a", [1], max_tokens=50)))
        while parent.receive():
            pass
        assert len(parent.outputs) == 2
        assert not any(out.finish_reason for out in parent.outputs), "another engine goes on"
    assert isinstance(raised[0], FailpointError)


def test_requests_without_a_token_are_named_before_the_step_that_computes_them() -> None:
    with running_loop() as (parent, _):
        parent.send(AddRequest(make_request("a", [1] * 40, max_tokens=3)))
        parent.wait_for_ends(1)
        parent.send(AddRequest(make_request("b", [1], max_tokens=3)))
        parent.wait_for_ends(2)
    kinds = [
        event.request_ids if isinstance(event, Computing) else "step" for event in parent.events
    ]
    # The prompt of 40 takes two steps; that `a` is fresh no more is said once.
    assert kinds[:4] == [["a"], "step", "step", []]
    assert kinds[kinds.index(["b"]) + 1] == "step"
    assert kinds.count([]) == 2
