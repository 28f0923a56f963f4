"""The engine process' loop, run in a thread over a real socket pair."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmserve import failpoints
from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.engine.grammar_compiler import GrammarCompiler
from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.errors import LLMServeError, RequestError
from llmserve.failpoints import FailpointError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import MaskArray
from llmserve.server.engine_process import (
    Channel,
    EngineLoop,
    FreshRequests,
    ParentGoneError,
)
from llmserve.server.grammar_queue import GrammarQueue
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
from support.engines import expected, make_engine, make_info, make_request, tokens_by_choice


class Letters(GrammarCompiler):
    """Knows two grammars: one of the id 5 for ever, and one that it refuses."""

    def __init__(self) -> None:
        pass

    def compile(self, grammar: Grammar) -> Any:
        if grammar.text == "bad":
            raise RequestError("no grammar", param="response_format")
        return Fives()


class Fives:
    def copy(self) -> Fives:
        return self

    def advance(self, token_ids: list[int]) -> None:
        """Always the same."""

    def mask(self) -> MaskArray:
        return np.array([1 << 5, 0, 0, 0], dtype=np.uint32)

    def error(self) -> str | None:
        return None


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
def running_loop(*ends: int) -> Iterator[tuple[Parent, list[BaseException]]]:
    """A loop over the scripted runner, and what it ended with."""
    ours, theirs = socket.socketpair()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            channel = Channel(theirs)
            fresh = FreshRequests(channel)
            with contextlib.closing(GrammarQueue(lambda: Letters(), timeout_s=5)) as grammars:
                runner = FakeRunner(make_info(eos_token_ids=ends))
                engine = make_engine(runner, watcher=fresh)
                EngineLoop(engine, channel, fresh, grammars).run()
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


def test_what_it_takes_to_load_the_compiler_is_no_fault_of_the_first_grammar() -> None:
    is_loaded, compiling, may_end = threading.Event(), threading.Event(), threading.Event()

    class Slow(Letters):
        def compile(self, grammar: Grammar) -> Any:
            compiling.set()
            may_end.wait(10)
            return super().compile(grammar)

    def load() -> GrammarCompiler:
        is_loaded.wait(10)
        return Slow()

    with contextlib.closing(GrammarQueue(load, timeout_s=1e-9)) as queue:
        queue.add(make_request("r", [1], grammar=Grammar(GrammarKind.REGEX, "5")))
        assert list(queue.ready()) == []  # far beyond its time, but not its own
        is_loaded.set()
        assert compiling.wait(10)
        ((request, outcome),) = queue.ready()
        may_end.set()
    assert request.request_id == "r"
    assert isinstance(outcome, RequestError)


def test_grammars_are_compiled_beside_the_steps_and_a_bad_one_is_the_requests_own_fault() -> None:
    with running_loop(96) as (parent, _):
        for name, text in (("good", "5"), ("bad", "bad")):
            grammar = Grammar(GrammarKind.REGEX, text)
            parent.send(AddRequest(make_request(name, [1], grammar=grammar, max_tokens=4)))
        parent.send(AddRequest(make_request("free", [1], max_tokens=4)))
        outputs = parent.wait_for_ends(3)
    tokens = tokens_by_choice(outputs)
    assert tokens["good", 0] == [5] * 4
    assert tokens["free", 0] == expected([1], 4)
    (refused,) = [output for output in outputs if output.request_id == "bad"]
    assert (refused.finish_reason, refused.error_param) == ("error", "response_format")


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


def test_requests_are_named_while_their_grammars_are_compiled() -> None:
    grammar = Grammar(GrammarKind.REGEX, "5")
    with running_loop(96) as (parent, _):
        parent.send(AddRequest(make_request("a", [1], grammar=grammar, max_tokens=2)))
        parent.wait_for_ends(1)
    first, *others = parent.events
    assert first == Computing(["a"])
    assert isinstance(others[0], Outputs), "between compiling and the step nothing changes"


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
