"""The engine process' loop, run in a thread over a real socket pair."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve import failpoints
from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.engine.grammar_compiler import GrammarCompiler
from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.errors import EngineError, RequestError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import MaskArray
from llmserve.server import engine_setup
from llmserve.server.engine_process import (
    MAX_FAILED_STEPS,
    Channel,
    EngineLoop,
    ParentGoneError,
    main,
)
from llmserve.server.grammar_queue import GrammarQueue
from llmserve.server.messages import (
    Abort,
    AddRequest,
    Command,
    EngineSettings,
    Event,
    Failed,
    Finish,
    Load,
    Outputs,
    Ready,
    Start,
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
            with contextlib.closing(GrammarQueue(lambda: Letters(), timeout_s=5)) as grammars:
                runner = FakeRunner(make_info(eos_token_ids=ends))
                EngineLoop(make_engine(runner), Channel(theirs), grammars).run()
        except (ParentGoneError, EngineError) as error:
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


def test_a_failed_step_ends_its_requests_and_the_next_is_served() -> None:
    with running_loop() as (parent, raised):
        failpoints.arm("engine.forward=raise@3")
        parent.send(AddRequest(make_request("a", [1], max_tokens=50)))
        (end,) = [out for out in parent.wait_for_ends(1) if out.finish_reason is not None]
        assert end.finish_reason is FinishReason.ERROR
        assert "FailpointError" in str(end.error)
        parent.send(AddRequest(make_request("b", [1], max_tokens=5)))
        assert tokens_by_choice(parent.wait_for_ends(2))["b", 0] == expected([1], 5)
        assert not raised


def test_failures_with_good_steps_between_do_not_add_up() -> None:
    with running_loop() as (parent, raised):
        for index in range(MAX_FAILED_STEPS + 1):
            failpoints.arm("engine.forward=raise@2")
            parent.send(AddRequest(make_request(f"r{index}", [1], max_tokens=50)))
            parent.wait_for_ends(index + 1)
        assert not raised


def test_steps_that_keep_failing_end_the_engine() -> None:
    with running_loop() as (parent, raised):
        failpoints.arm("engine.forward=raise")
        for index in range(MAX_FAILED_STEPS):
            parent.send(AddRequest(make_request(f"r{index}", [1])))
            if index < MAX_FAILED_STEPS - 1:
                parent.wait_for_ends(index + 1)
        while parent.receive():
            pass
    assert "in a row" in str(raised[0])


def run_main(
    model: str, *, commands: tuple[Command, ...] = (Start(),), **settings: object
) -> tuple[int, list[Event]]:
    """The process' entry, told to load and then `commands`; the parent leaves after an event."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    parent = Parent(ours)
    load = Load(EngineSettings(model=model, runner="fake", **settings))  # type: ignore[arg-type]
    parent.send(load, *commands)

    def listen() -> None:
        while not parent.events and parent.receive():
            pass
        ours.close()

    thread = threading.Thread(target=listen)
    thread.start()
    code = main(["--fd", str(theirs.detach())])
    thread.join()
    return code, parent.events


@pytest.fixture
def _signals() -> Iterator[None]:
    """`main` ignores signals, as befits a process of its own."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_the_entry_loads_a_model_and_says_what_it_is(model_folder: Path) -> None:
    code, events = run_main(str(model_folder), max_num_seqs=3, max_seq_len=100)
    assert code == 0
    (ready,) = events
    assert isinstance(ready, Ready)
    assert ready.info.vocab_size == 320
    assert (ready.config.max_num_seqs, ready.config.max_seq_len) == (3, 100)


@pytest.mark.usefixtures("_signals")
def test_the_entry_relays_why_it_cannot(tmp_path: Path, model_folder: Path) -> None:
    code, events = run_main(str(tmp_path / "none"))
    assert code == 1
    assert isinstance(events[0], Failed)
    assert "none" in events[0].message
    code, events = run_main(str(model_folder), max_seq_len=10_000)
    assert code == 1
    assert isinstance(events[0], Failed)
    assert "10000" in events[0].message


@pytest.mark.usefixtures("_signals")
def test_the_entry_takes_no_command_out_of_turn(model_folder: Path) -> None:
    code, events = run_main(str(model_folder), commands=(Abort("r"), Start()))
    assert code == 1
    assert isinstance(events[0], Failed)
    assert "a Start is due, not a Abort" in events[0].message


def test_steps_are_timed_after_the_server_is_ready_for_it(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    load, start = engine_setup._load_runner, engine_setup.start_engine
    monkeypatch.setattr(
        engine_setup, "_load_runner", lambda *args: (happened.append("load"), load(*args))[1]
    )
    monkeypatch.setattr(
        engine_setup,
        "start_engine",
        lambda *args, **options: (happened.append("time"), start(*args, **options))[1],
    )
    settings = EngineSettings(model=str(model_folder), runner="fake")
    with engine_setup.loaded_engine(settings, before_trials=lambda: happened.append("wait")):
        assert happened == ["load", "wait", "time"]
