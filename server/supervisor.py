"""Keeps engines running: replaces those that die or hang, and hands over what was in flight.

A dead engine costs its clients a pause and no request: the table of live requests
(`live_requests.py`) holds prompts, parameters, keys, deadlines and the tokens delivered, and the
next engine takes each request up like a preempted sequence. Requests that crash engines are found
and fail alone (`poison.py`); engines that die again and again without a token between end the
server (docs/processes.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time

from llmserve.engine.block_map import BlockMap
from llmserve.errors import EngineDeadError, LLMServeError, OverloadedError
from llmserve.limits import Limits

from .engine_client import EngineClient
from .engine_handle import EngineHandle
from .engine_launch import EngineLaunch
from .engine_stats import total_stats
from .folder_stamp import stamp_of
from .live_requests import Mailbox
from .loader_client import LoaderClient
from .messages import (
    Abort,
    AddRequest,
    Command,
    EngineSettings,
    Finish,
    Fork,
    Outputs,
    Ready,
)
from .poison import CrashCounts, is_from_outside
from .probes import PROBE, least_request
from .progress import Progress
from .replica import Replica
from .restarts import Restarts
from .router import Router

__all__ = ["EngineStartError", "Supervisor", "start_engines"]

TICK_S = 0.1
"""How often engines' progress is looked at."""

REVIVAL_S = 5.0
"""Least time between two loaders, while no engine needs one at once."""

START_TIMEOUT_S = 300.0
"""Time that a later engine gets to load, where a model does not survive a fork, and to serve."""

CONVICTED = "the engine crashed on this request each time it was tried"

_log = logging.getLogger("llmserve.server")


class EngineStartError(LLMServeError):
    """The first engine could not load what it was told to; the message is its own."""


async def start_engines(
    launch: EngineLaunch, settings: EngineSettings, *, limits: Limits, num_replicas: int = 1
) -> Supervisor:
    """Take over a loader that was told to load `settings`, and wait until all engines serve.

    Raises:
        EngineStartError: one said why it cannot, or ended without a word.
    """
    loader = await LoaderClient.take_over(launch)
    try:
        first = await loader.fork(Fork(0), Progress(stall_s=limits.engine_stall_s))
        ready = await first.ready
        supervisor = Supervisor(
            settings, ready, loader=loader, limits=limits, num_replicas=num_replicas
        )
        await supervisor.begin(first)
    except EngineDeadError as error:
        await loader.close()
        raise EngineStartError(str(error)) from error
    except BaseException:
        await loader.close()
        raise
    return supervisor


class Supervisor(EngineHandle):
    """One model's engines, in processes of their own."""

    def __init__(
        self,
        settings: EngineSettings,
        ready: Ready,
        *,
        loader: LoaderClient,
        limits: Limits,
        num_replicas: int,
    ) -> None:
        super().__init__(ready, limits=limits, num_replicas=num_replicas)
        self._settings = settings
        self._stamp = stamp_of(settings)
        self._stall_s = limits.engine_stall_s
        self._slowest_step_s = ready.config.full_step_s or 0.0
        self._loader = loader
        self._loading = asyncio.Lock()
        self._crashes = CrashCounts()
        self._restarts = Restarts()
        self._revived_at = 0.0
        self._has_grammars = False
        self._numbers = itertools.count(1)
        self._replicas = [
            Replica(index, self.requests, self._crashes) for index in range(num_replicas)
        ]
        self._router = Router(self._replicas, self.config)
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, first: EngineClient) -> None:
        """Start the other replicas beside `first`, and watch over all."""
        engines = [first]
        try:
            while len(engines) < len(self._replicas):
                engines.append(await self._start())
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        for replica, engine in zip(self._replicas, engines, strict=True):
            self._tasks.append(asyncio.create_task(self._keep(replica, engine)))
        self._tasks.append(asyncio.create_task(self._watch()))

    def send(self, command: Command) -> None:
        """Pass a command on to the replica that has the request, or is to have it."""
        match command:
            case AddRequest(request=request):
                live = self.requests.get(request.request_id)
                if request.grammar is not None and not self._has_grammars:
                    self._has_grammars = True
                    self._loader.load_grammars()
                if live is not None:
                    live.replica = self._router.choose(request)
            case Abort(request_id=request_id) | Finish(request_id=request_id):
                live = self.requests.get(request_id)
        if live is None:
            return
        replica = self._replicas[live.replica]
        replica.send(command, live)
        if replica.alone is not None:  # it may be the one that leaves the table now
            asyncio.get_running_loop().call_soon(replica.release)

    async def block_maps(self) -> list[list[BlockMap]]:
        """Asked of all that serve at once."""
        engines = [replica.engine for replica in self._replicas if replica.engine is not None]
        return list(await asyncio.gather(*(engine.block_maps() for engine in engines)))

    def stall(self) -> str | None:
        """Nobody serves: all are being replaced, or have work and make no steps."""
        engines = [replica.engine for replica in self._replicas if replica.engine is not None]
        if not engines:
            return "the engine is being started again"
        if all(engine.progress.is_stuck for engine in engines):
            silent_s = min(engine.progress.silent_s for engine in engines)
            return f"the engine has work and has made no step for {silent_s:.0f} s"
        return None

    async def close(self) -> None:
        """End engines and loader, and wait until they have ended; nothing is taken any more."""
        self.requests.fail_all("the engine was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        engines = [replica.engine for replica in self._replicas if replica.engine is not None]
        await asyncio.gather(*map(self._loader.end, engines))
        await self._loader.close()

    async def _keep(self, replica: Replica, engine: EngineClient) -> None:
        """Keep an engine in a place, until that is hopeless."""
        try:
            while True:
                engine.deliver_to(lambda outputs: self._receive(replica, outputs))
                replica.fill(engine)
                await engine.lost.wait()
                await self._bury(replica, engine)
                engine = await self._replace()
        except EngineDeadError as error:
            self.lose(str(error))
        except Exception as error:
            _log.exception("the supervisor failed")
            self.lose(f"the supervisor failed: {type(error).__name__}")

    def _receive(self, replica: Replica, outputs: Outputs) -> None:
        if outputs.outputs:
            self._restarts.progress()
        self.on_outputs(outputs)
        replica.receive(outputs)
        self.stats = total_stats([one.latest.stats for one in self._replicas if one.latest])

    async def _bury(self, replica: Replica, engine: EngineClient) -> None:
        """Find out what an engine died of, and who is to blame.

        Raises:
            EngineDeadError: too many have died without a token between.
        """
        was_busy, alone = replica.has_work, replica.alone
        replica.vacate()
        self._router.forget(replica.index)
        self.num_restarts += 1
        self._slowest_step_s = engine.progress.slowest_step_s
        status = await self._loader.status_of(engine)
        cause = _cause_of_death(engine, status)
        _log.warning("engine %d ended: %s; %d requests wait", engine.pid, cause, len(replica.live))
        is_crash = not is_from_outside(status) or engine.is_stuck
        if is_crash:
            convicted = self._crashes.blame(engine.computing, alone=alone)
            if convicted is not None:
                self._give_up(convicted, cause)
        if was_busy or is_crash:
            self._restarts.death(time.monotonic(), cause)

    def _give_up(self, request_id: str, cause: str) -> None:
        """Fail the request that engines crash on, and try whether they do so on every request.

        Raises:
            EngineDeadError: they do.
        """
        if request_id == PROBE:
            raise EngineDeadError(f"engines end on every request: {cause}")
        _log.error("a request is given up: the engine crashed on it, alone at the last")
        self.requests.fail(request_id, CONVICTED)
        self._restarts.progress()
        if self.requests.get(PROBE) is None:
            with contextlib.suppress(OverloadedError):  # what waits will tell as well
                self.requests.submit([least_request(self.info)], Mailbox())

    async def _replace(self) -> EngineClient:
        """Start an engine, again if it dies at once.

        Raises:
            EngineDeadError: too many have died without a token between.
        """
        while True:
            await asyncio.sleep(self._restarts.delay_s)
            try:
                return await self._start()
            except EngineDeadError as error:
                _log.warning("an engine could not be started: %s", error)
                self._restarts.death(time.monotonic(), str(error))

    async def _start(self) -> EngineClient:
        """An engine that serves, with the sizes of the first.

        Raises:
            EngineDeadError: it or the loader ended, or the model is not the one it was.
        """
        async with self._loading:
            await self._revive_loader()
            command = Fork(next(self._numbers), self.config)
            progress = Progress(stall_s=self._stall_s, slowest_step_s=self._slowest_step_s)
            engine = await self._loader.fork(command, progress)
        try:
            ready = await asyncio.wait_for(asyncio.shield(engine.ready), START_TIMEOUT_S)
            if ready.info != self.info:
                folder = self._settings.model
                raise EngineDeadError(f"the model folder {folder} is not what it was at the start")
        except TimeoutError:
            engine.kill()
            raise EngineDeadError(f"an engine was not ready in {START_TIMEOUT_S:g} s") from None
        except BaseException:
            engine.close()
            raise
        return engine

    async def _revive_loader(self) -> None:
        """Start another loader if there is none.

        Raises:
            EngineDeadError: it would load other files than the first, which were verified.
        """
        if not self._loader.is_gone:
            return
        self._revived_at = asyncio.get_running_loop().time()
        await self._loader.close()
        if stamp_of(self._settings) != self._stamp:
            raise EngineDeadError(f"files of {self._settings.model} were changed since the start")
        _log.warning("the loader ended; another loads the model")
        launch = EngineLaunch()
        launch.load(self._settings)
        self._loader = await LoaderClient.take_over(launch)
        if self._has_grammars:
            self._loader.load_grammars()

    async def _watch(self) -> None:
        """Replace engines that have work and make no steps; end what waits beyond its deadline."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            for replica in self._replicas:
                if replica.engine is not None:
                    self._check_progress(replica, replica.engine, now - before)
            before = now
            self.requests.expire(time.monotonic())
            if self._loader.is_gone and now - self._revived_at > REVIVAL_S:
                async with self._loading:
                    with contextlib.suppress(EngineDeadError):  # no engine needs it yet
                        await self._revive_loader()

    def _check_progress(self, replica: Replica, engine: EngineClient, elapsed_s: float) -> None:
        engine.tick(elapsed_s, has_work=replica.has_work, most_s=2 * TICK_S)
        if engine.progress.is_stuck and not engine.was_killed:
            _log.warning("engine %d has work and makes no steps: it is replaced", engine.pid)
            engine.kill_stuck()


def _cause_of_death(engine: EngineClient, status: int | None) -> str:
    if engine.cause is not None:
        return engine.cause
    if engine.was_killed:
        return "it made no steps"
    if status is None:
        return "for an unknown reason"
    return f"by signal {-status}" if status < 0 else f"with exit status {status}"
