"""A server's life: check the folder, take the port, take over the engine, serve, drain, end.

Nothing is bound before the model folder was checked, and nothing is answered before the engine
has loaded it. SIGINT and SIGTERM begin the drain: new requests get 503, those under way end
within `drain_s`; a second signal ends them at once. SIGHUP loads the model's folder anew. When the
engine is gone for good, clients are told and the server ends with a code that is not 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator

import uvicorn

from llmserve.errors import EngineDeadError

from .app import create_app, protect
from .engine_handle import EngineHandle
from .engine_launch import EngineLaunch
from .http_protocol import GuardedProtocol, protocol_for
from .listener import bound_socket, raise_file_limit, url_of
from .metrics import ServerMetrics
from .model_card import ModelCard
from .prompts import PromptReader
from .served_model import Model, open_model
from .service import ServedModel, Service
from .settings import ServerSettings
from .supervisor import start_engines
from .swap import Swapper
from .swap_gate import SwapRefusedError, read_probe
from .trace_export import open_export

__all__ = ["build_service", "serve", "serve_model"]

BACKLOG = 2048
FLUSH_S = 1.0
"""Time that replies get to be written out after the last request was ended."""
SPARE_FILES = 256
"""File descriptors beside those of the connections."""

_log = logging.getLogger("llmserve.server")

Announce = Callable[[Service, str], None]


def serve(settings: ServerSettings, launch: EngineLaunch, announce: Announce) -> int:
    """Serve until told to end; returns the exit code.

    `launch` is loading what `settings.engine` names; it is the caller's to close. `announce` is
    called with the service and its URL when requests are taken.

    Raises:
        CheckpointError: the model folder cannot be used; nothing was bound.
        ConfigError: a setting cannot be used, or the port is taken.
        EngineStartError: the engine could not load the model.
    """
    model = open_model(settings)
    if settings.swap.probe is not None:
        read_probe(settings.swap.probe)
    protocol = protocol_for(settings.http_parser, settings.limits)
    raise_file_limit(settings.limits.max_connections + SPARE_FILES)
    with (
        bound_socket(settings.host, settings.port) as listener,
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        return runner.run(_Server(settings, model, protocol, launch, announce).run(listener))


def build_service(settings: ServerSettings, model: Model, engine: EngineHandle) -> Service:
    """Everything that the routes work with."""
    served = serve_model(settings, model, engine)
    service = Service(
        settings=settings,
        model=served,
        metrics=ServerMetrics(
            lambda: service.engine,
            prefix=settings.metrics_prefix,
            model_name=served.card.names[0],
        ),
        spans=None if settings.otlp_endpoint is None else open_export(settings.otlp_endpoint),
    )
    service.put(served)
    return service


def serve_model(settings: ServerSettings, model: Model, engine: EngineHandle) -> ServedModel:
    """A model that an engine has loaded, as the routes see it."""
    prompts = PromptReader(
        model.tokenizer,
        model.template,
        max_seq_len=engine.config.max_seq_len,
        limits=settings.limits,
    )
    card = ModelCard.of(
        model.checkpoint,
        settings,
        engine,
        has_chat_template=prompts.has_template,
        records=model.records,
    )
    return ServedModel(
        settings=settings,
        opened=model,
        engine=engine,
        tokenizer=model.tokenizer,
        prompts=prompts,
        card=card,
        adapter_cards=tuple(map(card.with_adapter, model.adapters)),
    )


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its signals, and with an end to its patience."""

    abort_at = 0.0
    """Time on the loop's clock at which shutdown drops the connections that are left."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_at(max(self.abort_at, loop.time() + FLUSH_S), self.abort_connections)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def abort_connections(self) -> None:
        """Close every connection without waiting for its reader."""
        for connection in list(self.server_state.connections):
            assert isinstance(connection, GuardedProtocol)
            connection.abort()


class _Server:
    """One run, from the start of the engine to its end."""

    def __init__(
        self,
        settings: ServerSettings,
        model: Model,
        protocol: type[asyncio.Protocol],
        launch: EngineLaunch,
        announce: Announce,
    ) -> None:
        self._settings = settings
        self._model = model
        self._protocol = protocol
        self._launch = launch
        self._announce = announce
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._reload = asyncio.Event()

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        engine = await self._start_engine()
        if engine is None:
            return 0
        try:
            service = build_service(self._settings, self._model, engine)
            swapper = Swapper(service, serve_model)
        except BaseException:
            await engine.close()
            raise
        try:
            await self._serve(service, swapper, listener)
            cause = service.engine.cause_of_death
            if service.spans is not None:
                await asyncio.to_thread(service.spans.close)
        finally:
            await swapper.close()
            await service.engine.close()
        if cause is not None:
            raise EngineDeadError(cause)
        return 0

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    async def _start_engine(self) -> EngineHandle | None:
        """The engine, or None when the server was told to end before it was ready."""
        starting = asyncio.create_task(
            start_engines(
                self._launch,
                self._settings.engine,
                limits=self._settings.limits,
                num_replicas=self._settings.num_replicas,
            )
        )
        await _first(starting, self._stop.wait())
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return None
        return starting.result()

    async def _serve(self, service: Service, swapper: Swapper, listener: socket.socket) -> None:
        listener.listen(BACKLOG)
        server = _Uvicorn(self._uvicorn_config(service, swapper))
        self._announce(service, url_of(listener))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reloading = asyncio.create_task(self._reload_when_told(service, swapper))
        await _first(serving, self._stop.wait(), service.wait_dead())
        reloading.cancel()
        await self._drain(service, server)
        await _first(serving, self._stop_now.wait())
        if not serving.done():
            server.abort_connections()
        await serving

    async def _reload_when_told(self, service: Service, swapper: Swapper) -> None:
        """On SIGHUP load the model's folder anew: something else may have been put there."""
        while True:
            await self._reload.wait()
            self._reload.clear()
            with contextlib.suppress(SwapRefusedError):  # the log has it
                await swapper.swap(None)

    async def _drain(self, service: Service, server: _Uvicorn) -> None:
        """Let what is under way end; the listener stays open meanwhile, to say 503."""
        service.is_draining = True
        budget_s = self._settings.limits.drain_s
        if service.num_requests:
            _log.info("draining: %d requests get up to %g s", service.num_requests, budget_s)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + budget_s
        await _first(
            service.wait_idle(),
            self._stop_now.wait(),
            service.wait_dead(),
            timeout=budget_s,
        )
        if service.num_requests:
            _log.warning("%d requests were not done in time", service.num_requests)
            service.abort_all()
            deadline = loop.time()
        server.abort_at = deadline + FLUSH_S
        server.should_exit = True

    def _uvicorn_config(self, service: Service, swapper: Swapper) -> uvicorn.Config:
        limits = self._settings.limits
        return uvicorn.Config(
            protect(create_app(service, swapper), service),
            http=self._protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
            h11_max_incomplete_event_size=limits.max_header_bytes,
        )


async def _first(*awaitables: Awaitable[object], timeout: float | None = None) -> None:
    """Return when one of them is done; coroutines that are not are cancelled, tasks go on."""
    tasks = [asyncio.ensure_future(item) for item in awaitables]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task, item in zip(tasks, awaitables, strict=True):
        if task is not item:
            task.cancel()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
