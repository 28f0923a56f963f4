"""The engine process: one model, one engine, stepped for as long as the API process lives.

Started by `engine_launch.py` as `python -m llmserve.server.engine_process --fd N`, where N is its
end of a socket pair. It does nothing but compute: text, HTTP, limits and clients are the API
process's business, so a long step never keeps a client's socket waiting, nor the reverse.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import socket
import sys
import time
from typing import TypeVar

from llmserve.engine.engine import Engine
from llmserve.engine.grammar import Matcher
from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.errors import EngineError, LLMServeError, RequestError

from .engine_setup import grammar_queue, loaded_engine
from .grammar_queue import GrammarQueue
from .messages import (
    Abort,
    AddRequest,
    Command,
    Event,
    Failed,
    Finish,
    Load,
    Outputs,
    Ready,
    Start,
    command_decoder,
    encode_frame,
)

__all__ = ["Channel", "EngineLoop", "ParentGoneError", "main", "refusals"]

MAX_FAILED_STEPS = 3
"""Steps that may raise one after another before the process gives up."""

RECEIVE_BYTES = 1 << 18

GRAMMAR_POLL_S = 0.005
"""Longest time between two looks at the socket while the only work is to compile a grammar."""

_log = logging.getLogger("llmserve.engine")

C = TypeVar("C", bound=Command)


class ParentGoneError(LLMServeError):
    """The API process closed its end: there is nobody left to compute for."""


class Channel:
    """The engine's end of the socket pair: commands in, events out."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = command_decoder()
        self._waiting: list[Command] = []

    def expect(self, kind: type[C]) -> C:
        """The next command, which must be of this kind.

        Raises:
            EngineError: it is another.
            ParentGoneError: there is none any more.
        """
        self._waiting = self.receive(wait=True)
        command = self._waiting.pop(0)
        if not isinstance(command, kind):
            raise EngineError(f"a {kind.__name__} is due, not a {type(command).__name__}")
        return command

    def receive(self, *, wait: bool) -> list[Command]:
        """Commands that have arrived; with `wait`, at least one.

        Raises `ParentGoneError` at the end of the stream.
        """
        commands, self._waiting = self._waiting, []
        while True:
            flags = 0 if wait and not commands else socket.MSG_DONTWAIT
            try:
                data = self._connection.recv(RECEIVE_BYTES, flags)
            except BlockingIOError:
                return commands
            except ConnectionError as error:
                raise ParentGoneError(str(error)) from error
            if not data:
                raise ParentGoneError("the API process closed the connection")
            commands += self._decoder.feed(data)

    def send(self, event: Event) -> None:
        """Hand one event over; waits while the API process is behind in reading."""
        try:
            self._connection.sendall(encode_frame(event))
        except ConnectionError as error:
            raise ParentGoneError(str(error)) from error


class EngineLoop:
    """Drain commands, step, send what the step did; sleep when there is nothing to do."""

    def __init__(self, engine: Engine, channel: Channel, grammars: GrammarQueue) -> None:
        self._engine = engine
        self._channel = channel
        self._grammars = grammars
        self._refused: list[RequestOutput] = []
        self._num_steps = 0
        self._num_failed_steps = 0

    def run(self) -> None:
        """Serve until the parent leaves (`ParentGoneError`) or the engine fails for good.

        Raises `EngineError` after `MAX_FAILED_STEPS` steps in a row that raised.
        """
        while True:
            is_idle = not self._engine.has_work
            if is_idle and self._grammars.is_busy:
                self._grammars.wait(GRAMMAR_POLL_S)
                is_idle = False
            for command in self._channel.receive(wait=is_idle):
                self._apply(command)
            for request, matcher in self._grammars.ready():
                self._take_in(request, matcher)
            self._step()

    def _apply(self, command: Command) -> None:
        match command:
            case AddRequest(request=request):
                if request.grammar is None:
                    self._take_in(request, None)
                else:
                    self._grammars.add(request)
            case Abort(request_id=request_id):
                self._grammars.forget(request_id)
                self._engine.abort(request_id)
            case Finish(request_id=request_id, choice_index=choice_index):
                self._engine.finish(request_id, choice_index)
            case Load() | Start():
                raise EngineError("the engine is started already")

    def _take_in(self, request: Request, matcher: Matcher | LLMServeError | None) -> None:
        try:
            if isinstance(matcher, LLMServeError):
                raise matcher
            self._engine.add_request(request, matcher)
        except LLMServeError as error:
            self._refused += refusals(request, error)

    def _step(self) -> None:
        if not self._engine.has_work and not self._refused:
            return
        started = time.monotonic()
        num_steps = self._num_steps
        try:
            outputs = self._engine.step(started)
        except Exception as error:
            self._survive(error)
            return
        stats = self._engine.stats()
        self._num_steps = stats.num_steps
        if stats.num_steps > num_steps:  # the runner computed, not only last outputs collected
            self._num_failed_steps = 0
        step_s = time.monotonic() - started
        work = self._engine.last_work
        self._channel.send(Outputs(self._refused + outputs, stats, step_s, started, work))
        self._refused = []

    def _survive(self, error: Exception) -> None:
        """End the requests of a step that raised; the others go on."""
        self._num_failed_steps += 1
        self._num_steps = self._engine.stats().num_steps
        _log.error("step failed (%d in a row): %s", self._num_failed_steps, error, exc_info=error)
        message = f"the step failed: {type(error).__name__}"
        self._engine.fail_running(message)
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineError(f"{MAX_FAILED_STEPS} steps in a row failed, the last with: {error}")


def refusals(request: Request, error: LLMServeError) -> list[RequestOutput]:
    """The outputs, one for each choice, of a request that the engine did not take."""
    return [
        RequestOutput(
            request_id=request.request_id,
            choice_index=index,
            finish_reason=FinishReason.ERROR,
            error=str(error),
            error_param=(error.param or "") if isinstance(error, RequestError) else None,
        )
        for index in range(request.sampling_params.n)
    ]


def main(argv: list[str] | None = None) -> int:
    """Entry of the process; returns its exit code."""
    parser = argparse.ArgumentParser(description="One engine; started by llmserve serve.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the parent")
    connection = socket.socket(fileno=parser.parse_args(argv).fd)
    # The parent decides: it drains on these signals, and the end of its stream ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with connection:
        try:
            return _serve(Channel(connection))
        except ParentGoneError:
            return 0


def _serve(channel: Channel) -> int:
    try:
        settings = channel.expect(Load).settings
        with loaded_engine(settings, before_trials=lambda: channel.expect(Start)) as loaded:
            channel.send(Ready(loaded.info, loaded.engine.config, loaded.draft_info))
            with contextlib.closing(grammar_queue(settings, loaded.info)) as grammars:
                EngineLoop(loaded.engine, channel, grammars).run()
    except ParentGoneError:
        raise
    except LLMServeError as error:
        channel.send(Failed(str(error)))
    except Exception as error:
        _log.exception("the engine failed")
        channel.send(Failed(f"{type(error).__name__}: {error}"))
    return 1


if __name__ == "__main__":
    sys.exit(main())
