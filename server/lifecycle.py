"""A server's life: check the folder, take the port, take over the engine, serve, drain, end.

Nothing is bound before the model folder was checked, and nothing is answered before the engine
has loaded it. SIGINT and SIGTERM begin the drain: new requests get 503, those under way end
within `drain_s`; a second signal ends them at once. SIGHUP loads the models' folders anew. When all
engines are gone for good, clients are told and the server ends with a code that is not 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence

import uvicorn

from llmserve.errors import EngineDeadError
from llmserve.event_loop import loop_factory

from .app import create_app, protect
from .assembly import serve_model
from .engine_launch import EngineLaunch
from .http_protocol import GuardedProtocol, protocol_for
from .listener import bound_socket, raise_file_limit, url_of
from .models_start import open_models, start_state
from .served_model import Model
from .server_state import ServerState
from .service import Service
from .settings import ServerSettings
from .swap import Swapper
from .swap_gate import SwapRefusedError

__all__ = ["serve"]

BACKLOG = 2048
FLUSH_S = 1.0
"""Time that replies get to be written out after the last request was ended."""
SPARE_FILES = 256
"""File descriptors beside those of the connections."""

_log = logging.getLogger("llmserve.server")

Announce = Callable[[ServerState, str], None]


def serve(
    settings: ServerSettings,
    launches: Sequence[EngineLaunch],
    announce: Announce,
    *,
    available_memory: int | None,
) -> int:
    """Serve until told to end; returns the exit code.

    Args:
        settings: What to serve and how.
        launches: One for each model; they are the caller's to close. The first one is loading its
            model already.
        announce: Called with the server's state and URL when requests are taken.
        available_memory: Bytes that the models may take together; None: unknown.

    Raises:
        CheckpointError: a model folder cannot be used; nothing was bound.
        ConfigError: a setting cannot be used, the models do not fit, or the port is taken.
        EngineStartError: an engine could not load its model.
    """
    models = open_models(settings, available_memory)
    protocol = protocol_for(settings.http_parser, settings.limits)
    raise_file_limit(settings.limits.max_connections + SPARE_FILES)
    with (
        bound_socket(settings.host, settings.port) as listener,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        return runner.run(_Server(settings, models, protocol, launches, announce).run(listener))


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
        models: Sequence[Model],
        protocol: type[asyncio.Protocol],
        launches: Sequence[EngineLaunch],
        announce: Announce,
    ) -> None:
        self._settings = settings
        self._models = models
        self._protocol = protocol
        self._launches = launches
        self._announce = announce
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._reload = asyncio.Event()

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        state = await self._start()
        if state is None:
            return 0
        async with contextlib.AsyncExitStack() as stack:
            for service in state.services:
                stack.push_async_callback(_close_engine, service)
            swapper = Swapper(state, serve_model)
            stack.push_async_callback(swapper.close)
            await self._serve(state, swapper, listener)
            cause = state.cause_of_death
            if state.spans is not None:
                await asyncio.to_thread(state.spans.close)
        if cause is not None:
            raise EngineDeadError(cause)
        return 0

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    async def _start(self) -> ServerState | None:
        """The server over its engines; None when it was told to end before they were ready."""
        starting = asyncio.create_task(start_state(self._settings, self._models, self._launches))
        await _first(starting, self._stop.wait())
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return None
        return starting.result()

    async def _serve(self, state: ServerState, swapper: Swapper, listener: socket.socket) -> None:
        listener.listen(BACKLOG)
        server = _Uvicorn(self._uvicorn_config(state, swapper))
        gc.collect()
        gc.freeze()  # modules, routes and schemas stay; collections look at requests alone
        self._announce(state, url_of(listener))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reloading = asyncio.create_task(self._reload_when_told(state, swapper))
        await _first(serving, self._stop.wait(), state.wait_dead())
        reloading.cancel()
        await self._drain(state, server)
        await _first(serving, self._stop_now.wait())
        if not serving.done():
            server.abort_connections()
        await serving

    async def _reload_when_told(self, state: ServerState, swapper: Swapper) -> None:
        """On SIGHUP load the models' folders anew: something else may have been put there."""
        while True:
            await self._reload.wait()
            self._reload.clear()
            for service in state.services:
                with contextlib.suppress(SwapRefusedError):  # the log has it
                    await swapper.swap(None, name=service.name)

    async def _drain(self, state: ServerState, server: _Uvicorn) -> None:
        """Let what is under way end; the listener stays open meanwhile, to say 503."""
        state.is_draining = True
        budget_s = self._settings.limits.drain_s
        if state.num_requests:
            _log.info("draining: %d requests get up to %g s", state.num_requests, budget_s)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + budget_s
        await _first(
            state.wait_idle(),
            self._stop_now.wait(),
            state.wait_dead(),
            timeout=budget_s,
        )
        if state.num_requests:
            _log.warning("%d requests were not done in time", state.num_requests)
            state.abort_all()
            deadline = loop.time()
        server.abort_at = deadline + FLUSH_S
        server.should_exit = True

    def _uvicorn_config(self, state: ServerState, swapper: Swapper) -> uvicorn.Config:
        limits = self._settings.limits
        return uvicorn.Config(
            protect(create_app(state, swapper), state),
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


async def _close_engine(service: Service) -> None:
    """Close the engine that serves in the end, whichever that is."""
    await service.engine.close()


async def _first(*awaitables: Awaitable[object], timeout: float | None = None) -> None:
    """Return when one of them is done; coroutines that are not are cancelled, tasks go on."""
    tasks = [asyncio.ensure_future(item) for item in awaitables]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task, item in zip(tasks, awaitables, strict=True):
        if task is not item:
            task.cancel()
