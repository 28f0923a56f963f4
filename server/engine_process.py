"""An engine process: one engine, stepped for as long as the API process keeps its connection open.

It is forked by the loader (`engine_loader.py`), with the model in memory where that survives a
fork. It does nothing but compute: text, HTTP, limits and clients are the API process's business,
so a long step never keeps a client's socket waiting, nor the reverse. What goes wrong here ends the
process: the supervisor starts another and hands it what was in flight.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time

from llmserve.engine.engine import Engine
from llmserve.engine.grammar import Matcher
from llmserve.engine.prefix_transfer import ByteArray
from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.engine.step import Step
from llmserve.engine.watcher import Watcher
from llmserve.errors import EngineError, LLMServeError, RequestError
from llmserve.failpoints import hit, is_armed

from .engine_settings import EngineSettings
from .engine_setup import (
    LoadedModels,
    grammar_queue,
    loaded_models,
    settings_at,
    started_engine,
)
from .grammar_queue import GrammarQueue
from .handovers import Handovers
from .messages import (
    Abort,
    AddRequest,
    BlockMaps,
    Computing,
    EngineCommand,
    Event,
    Failed,
    Finish,
    Fork,
    Inspect,
    Outputs,
    Prefill,
    Ready,
    command_decoder,
    encode_frame,
)

__all__ = ["Channel", "EngineLoop", "FreshRequests", "ParentGoneError", "refusals", "serve_engine"]

RECEIVE_BYTES = 1 << 18

GRAMMAR_POLL_S = 0.005
"""Longest time between two looks at the socket while the only work is to compile a grammar."""

POISON_TOKEN = 7
"""The failpoint `engine.poison` is hit by steps with a request whose prompt begins with this id."""

_log = logging.getLogger("llmserve.engine")


class ParentGoneError(LLMServeError):
    """The API process closed its end: there is nobody left to compute for."""


class Channel:
    """The engine's end of the socket pair: commands in, events out."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._decoder = command_decoder()

    def receive(self, *, wait: bool) -> list[EngineCommand]:
        """Commands that have arrived; with `wait`, at least one.

        Raises `ParentGoneError` at the end of the stream.
        """
        commands: list[EngineCommand] = []
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


class FreshRequests(Watcher):
    """Tells the API process which requests without an output are being worked on, before they are:
    those of a step, and those whose grammars are being compiled.

    Should this end the process, these are the ones that may have done it.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._fresh: set[str] = set()
        self._in_step: set[str] = set()
        self._compiling: set[str] = set()
        self._told: set[str] = set()

    def added(self, request: Request) -> None:
        """It has had no output yet."""
        self._fresh.add(request.request_id)

    def scheduled(self, step: Step) -> None:
        """The step is about to be computed."""
        if self._fresh or self._in_step:
            self._in_step = {chunk.sequence.request_id for chunk in step.chunks} & self._fresh
            self._tell()
        if is_armed("engine.poison"):
            for sequence in (*step.decodes, *(chunk.sequence for chunk in step.chunks)):
                if sequence.token_ids[0] == POISON_TOKEN:
                    hit("engine.poison")

    def compiling(self, request_ids: set[str]) -> None:
        """The grammars of these are being compiled, beside the steps."""
        if request_ids != self._compiling:
            self._compiling = request_ids
            self._tell()

    def _tell(self) -> None:
        ids = self._in_step | self._compiling
        if ids != self._told:
            self._told = ids
            self._channel.send(Computing(sorted(ids)))

    def note(self, outputs: list[RequestOutput]) -> None:
        """These have got on, or ended."""
        if self._fresh:
            self._fresh.difference_update(output.request_id for output in outputs)


class EngineLoop:
    """Drain commands, step, send what the step did; sleep when there is nothing to do."""

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        fresh: FreshRequests,
        grammars: GrammarQueue,
        area: ByteArray | None = None,
    ) -> None:
        """`fresh` watches the engine; KV blocks are handed over through `area`.

        Raises `ConfigError` where there is an area and the engine cannot hand over.
        """
        self._engine = engine
        self._channel = channel
        self._fresh = fresh
        self._grammars = grammars
        self._handovers = None if area is None else Handovers(engine.prefix_transfer(), area)
        self._refused: list[RequestOutput] = []

    def run(self) -> None:
        """Serve until the parent leaves (`ParentGoneError`). What a step raises passes through."""
        while True:
            is_idle = not self._engine.has_work
            if is_idle and self._grammars.is_busy:
                self._grammars.wait(GRAMMAR_POLL_S)
                is_idle = False
            for command in self._channel.receive(wait=is_idle):
                self._apply(command)
            self._fresh.compiling(self._grammars.request_ids)
            for request, matcher in self._grammars.ready():
                self._take_in(request, matcher)
            if self._engine.has_work or self._refused:
                self._step()

    def _apply(self, command: EngineCommand) -> None:
        match command:
            case AddRequest(request=request, handover=handover):
                if handover is not None:
                    self._handing_over().take_in(request, handover)
                if request.grammar is None:
                    self._take_in(request, None)
                else:  # told first: a compiler that ends the process may do so at once
                    self._fresh.compiling({*self._grammars.request_ids, request.request_id})
                    self._grammars.add(request)
            case Abort(request_id=request_id):
                self._grammars.forget(request_id)
                self._engine.abort(request_id)
            case Finish(request_id=request_id, choice_index=choice_index):
                self._grammars.finish(request_id, choice_index)
                self._engine.finish(request_id, choice_index)
            case Prefill(request=request, handover=handover):
                self._handing_over().begin(request, handover)
                self._take_in(request, None)
            case Inspect():
                self._channel.send(BlockMaps(self._engine.block_maps()))

    def _handing_over(self) -> Handovers:
        if self._handovers is None:
            raise EngineError("KV blocks come or are asked for, and no memory is shared for them")
        return self._handovers

    def _take_in(self, request: Request, matcher: Matcher | LLMServeError | None) -> None:
        try:
            if isinstance(matcher, LLMServeError):
                raise matcher
            self._engine.add_request(request, matcher)
        except LLMServeError as error:
            self._refused += refusals(request, error)

    def _step(self) -> None:
        started = time.monotonic()
        outputs = self._engine.step(started)
        self._fresh.note(outputs)
        step_s = time.monotonic() - started
        work = self._engine.last_work
        outputs = self._refused + outputs
        moved = [] if self._handovers is None else self._handovers.settle(outputs)
        self._channel.send(Outputs(outputs, self._engine.stats(), step_s, started, work, moved))
        self._refused = []


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


def serve_engine(
    connection: socket.socket, settings: EngineSettings, models: LoadedModels | None, fork: Fork
) -> int:
    """Be an engine until the API process leaves; returns the exit code of the process.

    `models` are loaded here where they did not survive a fork.
    """
    channel = Channel(connection)
    try:
        if models is not None:
            _serve(channel, settings, models, fork)
        else:
            settings = settings_at(settings, fork.place)
            with loaded_models(settings) as loaded:
                _serve(channel, settings, loaded, fork)
    except ParentGoneError:
        return 0
    except LLMServeError as error:
        _fail(channel, str(error))
    except Exception as error:
        _log.exception("the engine failed")
        _fail(channel, f"{type(error).__name__}: {error}")
    return 1


def _serve(channel: Channel, settings: EngineSettings, models: LoadedModels, fork: Fork) -> None:
    fresh = FreshRequests(channel)
    with (
        started_engine(
            settings, models, number=fork.number, config=fork.config, watcher=fresh
        ) as loaded,
        contextlib.closing(grammar_queue(settings, loaded)) as grammars,
    ):
        loop = EngineLoop(loaded.engine, channel, fresh, grammars, models.area)
        channel.send(Ready(loaded.info, loaded.engine.config, loaded.draft_info))
        loop.run()


def _fail(channel: Channel, message: str) -> None:
    try:
        channel.send(Failed(message))
    except ParentGoneError:
        _log.warning("nobody was left to be told: %s", message)
