"""A server inside the test's process: the whole application over an engine that computes nothing.

`LocalServer` runs an event loop in a thread. Requests go straight to the ASGI application, or
through a real socket and uvicorn where the test is about bytes and connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from llmserve.engine.block_map import BlockMap
from llmserve.engine.engine import Engine
from llmserve.engine.request import RequestOutput
from llmserve.errors import LLMServeError
from llmserve.limits import Limits
from llmserve.runners.fake import FakeRunner, Script
from llmserve.server.app import create_app, protect
from llmserve.server.assembly import build_state, serve_model
from llmserve.server.engine_handle import EngineHandle
from llmserve.server.engine_process import GRAMMAR_POLL_S, refusals
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.engine_setup import (
    LoadedEngine,
    LoadedModels,
    grammar_queue,
    loaded_engine,
    started_engine,
)
from llmserve.server.folder_stamp import stamp_of
from llmserve.server.grammar_queue import GrammarQueue
from llmserve.server.http_protocol import protocol_for
from llmserve.server.messages import (
    Abort,
    AddRequest,
    Command,
    Finish,
    Outputs,
    Ready,
)
from llmserve.server.served_model import Model, open_model
from llmserve.server.server_state import ServerState
from llmserve.server.service import Service
from llmserve.server.settings import ModelSettings, ServerSettings
from llmserve.server.swap import Swapper

T = TypeVar("T")


class LocalEngine(EngineHandle):
    """An engine stepped by a task of the server's own loop.

    `running`, when cleared, stops it between steps; `trouble` is what it says of its health.
    """

    def __init__(
        self, engine: Engine, ready: Ready, limits: Limits, step_s: float, grammars: GrammarQueue
    ) -> None:
        super().__init__(ready, limits=limits)
        self.engine = engine
        self.trouble: str | None = None
        self._grammars = grammars
        self._refused: list[RequestOutput] = []
        self.running = asyncio.Event()
        self.running.set()
        self._step_s = step_s
        self._commands = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def send(self, command: Command) -> None:
        match command:
            case AddRequest(request=request) if request.grammar is not None:
                self._grammars.add(request)
            case AddRequest(request=request):
                self.engine.add_request(request)
            case Abort(request_id=request_id):
                self._grammars.forget(request_id)
                self.engine.abort(request_id)
            case Finish(request_id=request_id, choice_index=choice_index):
                self.engine.finish(request_id, choice_index)
        self._commands.set()

    async def block_maps(self) -> list[list[BlockMap]]:
        return [self.engine.block_maps()]

    def stall(self) -> str | None:
        return self.trouble

    async def close(self) -> None:
        self._grammars.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._commands.wait()
            await self.running.wait()
            self._take_in()
            started = time.monotonic()
            outputs = self._refused + self.engine.step(started)
            self._refused = []
            self.engine.check()
            step_s, self.stats = time.monotonic() - started, self.engine.stats()
            self.on_outputs(Outputs(outputs, self.stats, step_s, started, self.engine.last_work))
            self.requests.deliver(outputs)
            if self.engine.has_work:
                await asyncio.sleep(self._step_s)
            elif (
                self._grammars.is_busy
            ):  # as the engine's loop waits: the compiling thread needs it
                await asyncio.sleep(GRAMMAR_POLL_S)
            else:
                self._commands.clear()

    def _take_in(self) -> None:
        """Requests whose grammars are compiled."""
        for request, matcher in self._grammars.ready():
            if isinstance(matcher, LLMServeError):
                self._refused += refusals(request, matcher)
            else:
                self.engine.add_request(request, matcher)


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON of a stream's events; the last one must be `[DONE]`."""
        blocks = self.body.decode().split("\n\n")
        assert blocks[-1] == ""
        assert blocks[-2] == "data: [DONE]"
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


@dataclass
class LocalServer:
    """A running server; use it through `local_server`."""

    loop: asyncio.AbstractEventLoop
    state: ServerState
    engine: LocalEngine
    """The first model's."""
    app: Any
    routes: Sequence[Any] = field(default_factory=list)

    @property
    def service(self) -> Service:
        """The first model's."""
        return self.state.services[0]

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 30.0) -> T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def get(self, path: str, **headers: str) -> Reply:
        return self.run(call(self.app, "GET", path, headers=headers))

    def post(self, path: str, body: object, **headers: str) -> Reply:
        """`body` is sent as it is when it is bytes, else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.run(call(self.app, "POST", path, data, headers))

    def complete(self, **body: object) -> Reply:
        """POST /v1/completions, greedy unless said otherwise."""
        return self.post("/v1/completions", {"temperature": 0, "ignore_eos": True, **body})

    def wait_idle(self) -> None:
        """Wait until nothing is in flight, and check that nothing was left behind."""
        self.run(self.engine.requests.wait_idle())
        self.run(_settle(self.engine))
        stats = self.engine.engine.stats()
        assert stats.num_running + stats.num_waiting == 0
        assert stats.num_free_blocks == stats.num_blocks
        assert self.engine.requests.num_sequences == 0
        assert self.engine.requests.num_waiting_tokens == 0

    @contextmanager
    def listening(self, parser: str = "auto") -> Iterator[tuple[str, int]]:
        """Serve on a socket through uvicorn, with the guarded protocol; gives its address."""
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            self.app,
            http=protocol_for(parser, self.service.limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=self.service.limits.keep_alive_s,
            h11_max_incomplete_event_size=self.service.limits.max_header_bytes,
        )
        server = uvicorn.Server(config)
        serving = asyncio.run_coroutine_threadsafe(server.serve([listener]), self.loop)
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            serving.result(10)


async def _settle(engine: LocalEngine) -> None:
    while engine.engine.has_work:
        await asyncio.sleep(0.001)


async def call(
    app: Any,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    leave: asyncio.Event | None = None,
) -> Reply:
    """One request straight to an ASGI application; the client leaves when `leave` is set."""
    given = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
    names = {"host": "127.0.0.1", "content-type": "application/json", **given}
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [
            (name.lower().encode(), value.encode("latin-1"))
            for name, value in names.items()
            if value
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    done = leave or asyncio.Event()
    reply = Reply(0, {}, b"")

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {
                name.decode().lower(): value.decode() for name, value in message["headers"]
            }
        else:
            reply.body += message["body"]

    await app(scope, receive, send)
    return reply


@contextmanager
def local_server(
    folder: Path,
    *,
    more: Sequence[Path] = (),
    script: Script | None = None,
    step_s: float = 0.0,
    engine: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[LocalServer]:
    """A server for the model in `folder`, over the scripted runner unless `engine` names another.

    `more` are folders of further models; `engine` holds fields of `EngineSettings`, `settings`
    those of `ModelSettings` and `ServerSettings`.
    """
    sizes = {"cache_bytes": 1 << 20, "max_num_seqs": 16, "max_batched_tokens": 512}
    of_model = {key: settings.pop(key) for key in ("names", "chat_template") if key in settings}
    asked = [
        EngineSettings(model=str(one), **{"runner": "fake", **sizes, **(engine or {})})
        for one in (folder, *more)
    ]
    started_with = tuple(ModelSettings(engine=one, **of_model) for one in asked)
    values = ServerSettings(models=started_with, **settings)
    models = [open_model(one, values.limits) for one in started_with]
    with contextlib.ExitStack() as stack:
        loaded = [
            stack.enter_context(_loaded(one, model, script))
            for one, model in zip(asked, models, strict=True)
        ]
        yield stack.enter_context(_running(values, models, loaded, step_s))


def _loaded(
    asked: EngineSettings, model: Model, script: Script | None
) -> contextlib.AbstractContextManager[LoadedEngine]:
    if script is None:
        return loaded_engine(asked)
    runner = FakeRunner.for_config(model.checkpoint.config, script=script)
    return started_engine(asked, LoadedModels(runner=runner, draft=None, stamp=stamp_of(asked)))


@contextmanager
def _running(
    values: ServerSettings, models: Sequence[Model], loaded: Sequence[LoadedEngine], step_s: float
) -> Iterator[LocalServer]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[list[LocalEngine], ServerState, Any, Any]:
        engines = [
            LocalEngine(
                one.engine,
                Ready(one.info, one.engine.config, one.draft_info),
                values.limits,
                step_s,
                grammar_queue(asked.engine, one),
            )
            for asked, one in zip(values.models, loaded, strict=True)
        ]
        state = build_state(values, models, engines)
        app = create_app(state, Swapper(state, serve_model))
        return engines, state, protect(app, state), app.routes

    engines, state, app, routes = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    server = LocalServer(loop, state, engines[0], app, routes)
    try:
        yield server
    finally:
        for engine in engines:
            server.run(engine.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
