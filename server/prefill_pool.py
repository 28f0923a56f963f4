"""Engines that only read prompts, and what becomes of their work (docs/processes.md).

A prompt that is long enough goes to one of them first. When it is computed, its KV blocks lie in
memory that all engines of the loader share, and the request goes to the engine that writes its
answer, which takes them into its prefix cache. Whatever fails on the way, the request goes there
all the same, and is computed there: this is about speed alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from llmserve.engine.prefix_transfer import transfer_bytes
from llmserve.engine.request import Request, RequestOutput
from llmserve.errors import EngineDeadError
from llmserve.sampling import SamplingParams

from .engine_client import EngineClient
from .engine_source import EngineSource, cause_of_death
from .engine_stats import HandoverTotals
from .live_requests import LiveRequest, LiveRequests
from .messages import Abort, BlocksMoved, Handover, Outputs, Prefill, Ready
from .poison import is_from_outside
from .restarts import Restarts
from .router import Router
from .shared_ranges import SharedRanges

__all__ = ["PrefillPlace", "PrefillPool"]

MIN_NEW_BLOCKS = 4
"""Fewer blocks of a prompt that the engine which writes has not seen are not worth the way."""

_log = logging.getLogger("llmserve.server")


@dataclass(slots=True)
class _Job:
    """A prompt on its way, and the bytes set aside for its blocks."""

    live: LiveRequest
    ranges: SharedRanges
    handover: Handover
    engine: EngineClient
    """Who may touch the bytes now."""

    def end(self) -> None:
        """Give the bytes back."""
        self.ranges.give_back(self.handover.start, self.handover.size)


class PrefillPlace:
    """A place for one engine at a time that only reads."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.engine: EngineClient | None = None
        """None while one is being started, or none is any more."""
        self.jobs: dict[str, _Job] = {}
        """By request id."""
        self.latest: Outputs | None = None
        """What its engine said last, for the statistics."""

    @property
    def live(self) -> list[LiveRequest]:
        """Requests whose prompts its engine has."""
        return [job.live for job in self.jobs.values()]


class PrefillPool:
    """Sends prompts to engines that only read, and their requests on to those that write."""

    def __init__(
        self,
        count: int,
        source: EngineSource,
        ready: Ready,
        requests: LiveRequests,
        pass_on: Callable[[LiveRequest, Handover | None], EngineClient | None],
        on_outputs: Callable[[Outputs], None],
    ) -> None:
        """Places without engines yet (`keep`).

        Args:
            count: How many.
            source: Where engines come from.
            ready: What the model's first engine said.
            requests: Those that have not ended.
            pass_on: Gives a request to an engine that writes and returns that; None: it waits.
            on_outputs: Told of every step of these engines, without ends: those are not the
                requests'.
        """
        self.places = [PrefillPlace(index) for index in range(count)]
        self.totals = HandoverTotals()
        self._source = source
        self._on_outputs = on_outputs
        self._requests = requests
        self._pass_on = pass_on
        self._router = Router(self.places, ready.config)
        self._block_size = ready.config.block_size
        self._block_bytes = self._block_size * ready.info.cache_bytes_per_token
        self._reading: dict[str, _Job] = {}

    def begin(self, live: LiveRequest, writer: EngineClient | None, num_known: int) -> bool:
        """Have a prompt computed here first; False: that is not possible, or not worth it.

        Args:
            live: The request.
            writer: The engine that is to write the answer.
            num_known: Full blocks of the prompt that it has seen.
        """
        request = live.request
        num_blocks = len(request.prompt_token_ids) // self._block_size
        if writer is None or num_blocks - num_known < MIN_NEW_BLOCKS or not _is_fit(request):
            return False
        if all(place.engine is None for place in self.places):
            return False
        place = self.places[self._router.choose(request).place]
        engine = place.engine
        if engine is None or engine.ranges is not writer.ranges:
            return False
        size = transfer_bytes(num_blocks, self._block_bytes)
        start = engine.ranges.take(size)
        if start is None:
            return False
        job = _Job(live, engine.ranges, Handover(start, size), engine)
        place.jobs[request.request_id] = job
        live.is_prefilling = True
        prompt = _prompt_of(request, num_blocks * self._block_size)
        engine.send(Prefill(prompt, job.handover))
        return True

    def abort(self, request_id: str) -> None:
        """Nobody wants the prompt any more. Its bytes are free when the engine has said so."""
        for place in self.places:
            if place.engine is not None and request_id in place.jobs:
                place.engine.send(Abort(request_id))

    def note_read(self, outputs: Outputs) -> None:
        """An engine that writes has taken blocks in: their bytes are free."""
        for moved in outputs.moved:
            job = self._reading.pop(moved.request_id, None)
            if job is not None:
                job.end()
                self.totals.num_blocks += moved.num_blocks
                self.totals.seconds += moved.seconds

    def forget(self, engine: EngineClient) -> None:
        """An engine that writes has ended: it reads no more."""
        for request_id, job in list(self._reading.items()):
            if job.engine is engine:
                self._reading.pop(request_id).end()

    async def keep(self, place: PrefillPlace, engine: EngineClient) -> None:
        """Keep an engine in a place, until that is hopeless; the server goes on without it then."""
        restarts = Restarts()
        try:
            while True:
                engine.deliver_to(lambda outputs: self._receive(place, restarts, outputs))
                place.engine = engine
                await engine.lost.wait()
                await self._bury(place, engine, restarts)
                engine = await self._source.replace(restarts)
        except EngineDeadError as error:
            _log.error("prompts are read by the engines that write from now on: %s", error)

    def check_progress(self, elapsed_s: float, most_s: float) -> None:
        """Replace engines that have work and make no steps."""
        for place in self.places:
            if place.engine is not None:
                place.engine.kill_if_stuck(elapsed_s, has_work=bool(place.jobs), most_s=most_s)

    async def _bury(self, place: PrefillPlace, engine: EngineClient, restarts: Restarts) -> None:
        """Send on what it had, to be computed where the answers are written.

        Raises:
            EngineDeadError: too many have died without a prompt between.
        """
        jobs, place.jobs, place.engine = place.jobs, {}, None
        self._router.forget(place.index)
        self.totals.num_restarts += 1
        self._source.slowest_step_s = engine.progress.slowest_step_s
        for job in jobs.values():
            job.end()
            self._send_on(job.live, None)
        status = await self._source.status_of(engine)
        cause = cause_of_death(engine, status)
        _log.warning("engine %d for prompts ended: %s", engine.pid, cause)
        if jobs or not is_from_outside(status):
            restarts.death(time.monotonic(), cause)

    def _receive(self, place: PrefillPlace, restarts: Restarts, outputs: Outputs) -> None:
        place.latest = outputs
        self._on_outputs(_without_ends(outputs))
        moved = {one.request_id: one for one in outputs.moved}
        for output in outputs.outputs:
            if output.finish_reason is None:
                continue
            restarts.progress()
            job = place.jobs.pop(output.request_id)
            self._settle(job, output, moved.get(output.request_id))

    def _settle(self, job: _Job, output: RequestOutput, moved: BlocksMoved | None) -> None:
        live = job.live
        request_id = live.request.request_id
        if self._requests.get(request_id) is not live:  # it has ended meanwhile
            job.end()
            return
        if moved is None or not moved.num_blocks:
            job.end()
            self._send_on(live, None)
            return
        live.num_cached_tokens = output.num_cached_tokens
        live.scheduled_time = output.scheduled_time
        self.totals.num_requests += 1
        self.totals.seconds += moved.seconds
        filled = Handover(job.handover.start, job.handover.size, moved.num_blocks)
        writer = self._send_on(live, filled)
        if writer is None:
            job.end()
        else:
            job.engine = writer
            self._reading[request_id] = job

    def _send_on(self, live: LiveRequest, handover: Handover | None) -> EngineClient | None:
        live.is_prefilling = False
        if self._requests.get(live.request.request_id) is not live:
            return None
        return self._pass_on(live, handover)


def _is_fit(request: Request) -> bool:
    """Whether the blocks of its prompt would be taken from the prefix cache."""
    is_read = request.pooling is not None or request.scoring is not None
    return not is_read and request.sampling_params.prompt_logprobs is None


def _prompt_of(request: Request, num_tokens: int) -> Request:
    """The beginning of its prompt alone, with nothing to draw."""
    return replace(
        request,
        prompt_token_ids=request.prompt_token_ids[:num_tokens],
        sampling_params=SamplingParams(max_tokens=0),
        grammar=None,
    )


def _without_ends(outputs: Outputs) -> Outputs:
    """What a step of such an engine says of requests that go on elsewhere."""
    return msgspec.structs.replace(
        outputs,
        outputs=[
            RequestOutput(
                one.request_id,
                0,
                scheduled_time=one.scheduled_time,
                num_cached_tokens=one.num_cached_tokens,
            )
            for one in outputs.outputs
        ],
    )
