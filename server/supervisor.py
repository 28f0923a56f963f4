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
import logging
import time

from llmserve.engine.block_map import BlockMap
from llmserve.errors import EngineDeadError, OverloadedError
from llmserve.limits import Limits

from .engine_client import EngineClient
from .engine_handle import EngineHandle
from .engine_source import EngineSource, cause_of_death
from .engine_stats import total_stats
from .live_requests import LiveRequest
from .mailbox import Mailbox
from .messages import (
    Abort,
    AddRequest,
    Command,
    Finish,
    Handover,
    Outputs,
    Ready,
)
from .poison import CrashCounts, is_from_outside
from .prefill_pool import PrefillPlace, PrefillPool
from .probes import PROBE, least_request
from .replica import Replica
from .restarts import Restarts
from .router import Router

__all__ = ["Supervisor"]

TICK_S = 0.1
"""How often engines' progress is looked at."""

CONVICTED = "the engine crashed on this request each time it was tried"

_log = logging.getLogger("llmserve.server")


class Supervisor(EngineHandle):
    """One model's engines, in processes of their own."""

    def __init__(
        self,
        ready: Ready,
        *,
        source: EngineSource,
        limits: Limits,
        num_replicas: int,
        num_prefill_engines: int,
    ) -> None:
        super().__init__(ready, limits=limits, num_replicas=num_replicas)
        self._source = source
        self._crashes = CrashCounts()
        self._restarts = Restarts()
        self._replicas = [
            Replica(index, self.requests, self._crashes) for index in range(num_replicas)
        ]
        self._router = Router(self._replicas, self.config, counts_known=num_prefill_engines > 0)
        self._prefill = PrefillPool(
            num_prefill_engines, source, ready, self.requests, self._pass_on, self._note_prefill
        )
        if num_prefill_engines:
            self.handovers = self._prefill.totals
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, first: EngineClient) -> None:
        """Start the other engines beside `first`, and watch over all."""
        readers = self._prefill.places
        engines = [first]
        try:
            while len(engines) < len(self._replicas) + len(readers):
                engines.append(await self._source.start(len(engines)))
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        for replica in self._replicas:
            self._tasks.append(asyncio.create_task(self._keep(replica, engines.pop(0))))
        for place in readers:
            self._tasks.append(asyncio.create_task(self._prefill.keep(place, engines.pop(0))))
        self._tasks.append(asyncio.create_task(self._watch()))

    def send(self, command: Command) -> None:
        """Pass a command on to the replica that has the request, or is to have it."""
        match command:
            case AddRequest(request=request):
                live = self.requests.get(request.request_id)
                if request.grammar is not None:
                    self._source.load_grammars()
                if live is not None and self._route(live):
                    return
            case Abort(request_id=request_id) | Finish(request_id=request_id):
                live = self.requests.get(request_id)
                if live is not None and live.is_prefilling:
                    self._prefill.abort(request_id)
                    return
        if live is None:
            return
        replica = self._replicas[live.replica]
        replica.send(command, live)
        if replica.alone is not None:  # it may be the one that leaves the table now
            asyncio.get_running_loop().call_soon(replica.release)

    def _route(self, live: LiveRequest) -> bool:
        """Choose the replica; whether an engine that only reads has the prompt first."""
        live.replica, num_known = self._router.choose(live.request)
        replica = self._replicas[live.replica]
        return self._prefill.begin(live, replica.engine, num_known)

    def _pass_on(self, live: LiveRequest, handover: Handover | None) -> EngineClient | None:
        """Give a request whose prompt was computed elsewhere to its replica."""
        replica = self._replicas[live.replica]
        replica.send(AddRequest(live.resumed(), handover), live)
        return None if live.engine is None else replica.engine

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
        places: list[Replica | PrefillPlace] = [*self._replicas, *self._prefill.places]
        engines = [place.engine for place in places if place.engine is not None]
        await asyncio.gather(*map(self._source.end, engines))
        await self._source.close()

    async def _keep(self, replica: Replica, engine: EngineClient) -> None:
        """Keep an engine in a place, until that is hopeless."""
        try:
            while True:
                engine.deliver_to(lambda outputs: self._receive(replica, outputs))
                replica.fill(engine)
                await engine.lost.wait()
                await self._bury(replica, engine)
                engine = await self._source.replace(self._restarts, replica.index)
        except EngineDeadError as error:
            self.lose(str(error))
        except Exception as error:
            _log.exception("the supervisor failed")
            self.lose(f"the supervisor failed: {type(error).__name__}")

    def _receive(self, replica: Replica, outputs: Outputs) -> None:
        if outputs.outputs:
            self._restarts.progress()
        self._prefill.note_read(outputs)
        self.on_outputs(outputs)
        replica.receive(outputs)
        self._add_up()

    def _note_prefill(self, outputs: Outputs) -> None:
        self.on_outputs(outputs)
        self._add_up()

    def _add_up(self) -> None:
        places: list[Replica | PrefillPlace] = [*self._replicas, *self._prefill.places]
        self.stats = total_stats([one.latest.stats for one in places if one.latest])

    async def _bury(self, replica: Replica, engine: EngineClient) -> None:
        """Find out what an engine died of, and who is to blame.

        Raises:
            EngineDeadError: too many have died without a token between.
        """
        was_busy, alone = replica.has_work, replica.alone
        replica.vacate()
        self._router.forget(replica.index)
        self._prefill.forget(engine)
        self.num_restarts += 1
        self._source.slowest_step_s = engine.progress.slowest_step_s
        status = await self._source.status_of(engine)
        cause = cause_of_death(engine, status)
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

    async def _watch(self) -> None:
        """Replace engines that have work and make no steps; end what waits beyond its deadline."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            for replica in self._replicas:
                if replica.engine is not None:
                    replica.engine.kill_if_stuck(
                        now - before, has_work=replica.has_work, most_s=2 * TICK_S
                    )
            self._prefill.check_progress(now - before, most_s=2 * TICK_S)
            before = now
            self.requests.expire(time.monotonic())
            await self._source.revive_if_due()
