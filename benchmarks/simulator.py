"""The engine over a virtual clock: a trace goes in, times and counts come out.

The loop is a server's: requests whose time has come are queued, then the engine steps. A step takes
as long as the cost model says; when there is nothing to do, the clock jumps to the next arrival. A
request may take a while to come to the engine, which goes on meanwhile.
The trace is read as the clock passes it, and what is kept of a request is six numbers.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from llmserve.engine.config import EngineConfig, PolicyName
from llmserve.engine.engine import Engine, EngineStats
from llmserve.engine.request import FinishReason, Request
from llmserve.errors import ConfigError, DataError, EngineError
from llmserve.sampling import SamplingParams
from llmserve.startup import EngineOptions

from .traces import TraceRequest, TraceSize
from .virtual_runner import StepLaw, VirtualClock, VirtualRunner

__all__ = ["RecordedTraffic", "RequestTimes", "SimulatedEngine", "Simulation", "simulate"]

Progress = Callable[[int], None]
"""Is told how many requests have ended, now and then."""

STEPS_BETWEEN_REPORTS = 256


class RecordedTraffic(Protocol):
    """Requests in order of arrival, the same at each reading, as of a `Trace`."""

    @property
    def block_size(self) -> int | None:
        """Tokens behind one of the requests' block keys; None: they have none."""
        ...

    def __iter__(self) -> Iterator[TraceRequest]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEngine:
    """The engine and the machine that a trace is played to."""

    cost: StepLaw
    """What a step takes."""
    block_size: int
    """Tokens in one KV block."""
    num_blocks: int | None = None
    """KV blocks; None: so many that none is ever missed or evicted."""
    max_num_seqs: int = 64
    """Most sequences running at once."""
    max_batched_tokens: int = 512
    """Most tokens in one step."""
    policy: PolicyName = "fcfs"
    """Who is served first."""
    has_prefix_cache: bool = True
    """Whether blocks are shared between requests with equal beginnings."""
    entry_s: float = 0.0
    """From a request's arrival to its place in the engine's queue."""
    repeats_decodes: bool = True
    """Whether a step of decodes alone may have several rounds: as many as a server's may, by the
    virtual time."""

    def config_for(self, trace: RecordedTraffic, size: TraceSize) -> EngineConfig:
        """The engine's sizes for a trace.

        Where no block is ever missed and the trace names none, the prefix cache can find nothing,
        and is left out: it would keep every block.

        Raises:
            ConfigError: the sizes do not fit each other, or not the trace's longest request.
        """
        longest = -(-size.max_len // self.block_size)
        if self.num_blocks is not None and self.num_blocks < longest:
            raise ConfigError(
                f"{self.num_blocks} KV blocks of {self.block_size} tokens cannot hold the trace's "
                f"longest request, {size.max_len} tokens in {longest} blocks: give more blocks, or "
                "scale the lengths down"
            )
        has_hits = self.num_blocks is not None or trace.block_size is not None
        return EngineConfig(
            num_blocks=(self.num_blocks or self._enough_blocks(trace, size),),
            block_size=self.block_size,
            max_seq_len=size.max_len,
            max_batched_tokens=self.max_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            policy=self.policy,
            has_prefix_cache=self.has_prefix_cache and has_hits,
            most_rounds_s=EngineOptions().most_rounds_s,
        )

    def _enough_blocks(self, trace: RecordedTraffic, size: TraceSize) -> int:
        """Blocks of which none is ever missed or evicted.

        For a cache, each request's own and a copy of a shared tail; else what can run at a time;
        and one for every running sequence, which admission keeps in hand.
        """
        kept = size.num_blocks + size.num_requests
        if trace.block_size is None or not self.has_prefix_cache:
            kept = min(kept, self.max_num_seqs * -(-size.max_len // self.block_size))
        return kept + self.max_num_seqs


class RequestTimes:
    """When things happened to each request, in the trace's order. Seconds of the virtual clock."""

    def __init__(self) -> None:
        self.arrival_s = array("d")
        self.scheduled_s = array("d")
        self.first_token_s = array("d")
        self.last_token_s = array("d")
        self.input_len = array("q")
        self.output_len = array("q")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def add(self, request: TraceRequest) -> None:
        """Enter a request of which nothing has happened but its arrival."""
        self.arrival_s.append(request.arrival_s)
        self.input_len.append(request.input_len)
        self.output_len.append(request.output_len)
        for column in (self.scheduled_s, self.first_token_s, self.last_token_s):
            column.append(math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What came out."""

    times: RequestTimes
    stats: EngineStats
    """The engine's, at the end."""
    num_blocks: int
    """KV blocks there were."""
    duration_s: float
    """Virtual time from the trace's start to the last token."""
    busy_s: float
    """Of it, spent in steps."""
    most_running: int
    """Most sequences in one step."""
    wall_s: float
    """Real time that the simulation took."""


def simulate(
    trace: RecordedTraffic,
    size: TraceSize,
    simulated: SimulatedEngine,
    *,
    max_concurrency: int | None = None,
    on_progress: Progress | None = None,
) -> Simulation:
    """Play `trace`, whose size is `size`, to the end of its last request.

    `max_concurrency` makes it a closed loop of so many clients, who each send the next request
    when their last one has ended; the times of arrival in the trace say only when it is due first.

    Raises:
        ConfigError: the engine's sizes do not fit each other or the longest request.
        DataError: a line cannot be used, or lacks what the scheduling policy looks at.
    """
    start_s = time.perf_counter()
    clock = VirtualClock()
    config = simulated.config_for(trace, size)
    runner = VirtualRunner(
        simulated.cost,
        clock,
        max_seq_len=size.max_len,
        repeats_decodes=simulated.repeats_decodes,
    )
    run = _Run(
        trace,
        Engine(runner, config),
        clock,
        most_under_way=max_concurrency or math.inf,
        entry_s=simulated.entry_s,
    )
    run.play(on_progress)
    return Simulation(
        times=run.times,
        stats=run.engine.stats(),
        num_blocks=config.num_blocks[0],
        duration_s=clock.now_s,
        busy_s=runner.busy_s,
        most_running=runner.most_sequences,
        wall_s=time.perf_counter() - start_s,
    )


class _Run:
    """One simulation under way."""

    def __init__(
        self,
        trace: RecordedTraffic,
        engine: Engine,
        clock: VirtualClock,
        *,
        most_under_way: float,
        entry_s: float,
    ) -> None:
        self.engine = engine
        self.times = RequestTimes()
        self._clock = clock
        self._trace = trace
        self._requests: Iterator[TraceRequest] = iter(trace)
        self._next = next(self._requests, None)
        self._entry_s = entry_s
        self._on_their_way: deque[TraceRequest] = deque()  # to the engine, the last ones of `times`
        self._without_token: set[str] = set()  # requests whose first token has not come
        self._num_ended = 0
        self._most_under_way = most_under_way
        # First come, first served looks no further than the front of its queue. That it is filled
        # for one step changes nothing, and a long queue need not be held.
        most = 2 * engine.config.max_num_seqs
        self._most_without_token = most if engine.config.policy == "fcfs" else math.inf

    def play(self, on_progress: Progress | None) -> None:
        engine, clock = self.engine, self._clock
        num_steps = 0
        while True:
            self._queue_due()
            if engine.has_work:
                self._step()
            elif self._on_their_way:
                clock.advance_to(self._on_their_way[0].arrival_s + self._entry_s)
            elif self._next is not None:
                clock.advance_to(self._next.arrival_s)
            else:
                return
            num_steps += 1
            if on_progress is not None and num_steps % STEPS_BETWEEN_REPORTS == 0:
                on_progress(self._num_ended)

    def _queue_due(self) -> None:
        """Give the engine the requests that have come to it."""
        self._send_due()
        waiting, now_s = self._on_their_way, self._clock.now_s
        while waiting and waiting[0].arrival_s + self._entry_s <= now_s:
            index = len(self.times) - len(waiting)
            self.engine.add_request(self._request(index, waiting.popleft()))

    def _send_due(self) -> None:
        """Send the requests whose time has come on their way."""
        while (
            self._next is not None
            and self._next.arrival_s <= self._clock.now_s
            and len(self._without_token) < self._most_without_token
            and len(self.times) - self._num_ended < self._most_under_way
        ):
            request = self._next
            if self._most_under_way < math.inf:  # it comes when its client sends it
                request = replace(request, arrival_s=self._clock.now_s)
            self._without_token.add(str(len(self.times)))
            self.times.add(request)
            self._on_their_way.append(request)
            self._next = next(self._requests, None)

    def _step(self) -> None:
        outputs = self.engine.step(self._clock.now_s)
        now_s, waiting, times = self._clock.now_s, self._without_token, self.times
        for output in outputs:
            if output.request_id in waiting:
                waiting.remove(output.request_id)
                index = int(output.request_id)
                times.first_token_s[index] = now_s
                assert output.scheduled_time is not None, "a token came before it was scheduled"
                times.scheduled_s[index] = output.scheduled_time
            if output.finish_reason is not None:
                if output.finish_reason is not FinishReason.LENGTH:
                    raise EngineError(f"a request ended as {output.finish_reason}: {output.error}")
                times.last_token_s[int(output.request_id)] = now_s
                self._num_ended += 1

    def _request(self, index: int, traced: TraceRequest) -> Request:
        policy = self.engine.config.policy
        return Request(
            request_id=str(index),
            prompt_token_ids=[index] * traced.input_len,
            sampling_params=SamplingParams(
                max_tokens=traced.output_len, ignore_eos=True, temperature=0.0
            ),
            seed=0,
            arrival_time=traced.arrival_s,
            block_keys=self._block_keys(traced),
            priority=self._known(traced, "priority") if policy == "priority" else 0,
            tenant=self._known(traced, "tenant") if policy == "fair" else "",
        )

    def _block_keys(self, traced: TraceRequest) -> list[int] | None:
        """The trace's names for its blocks, each cut into as many as the engine's are smaller."""
        if traced.block_keys is None or self._trace.block_size is None:
            return None
        block_size = self.engine.config.block_size
        pieces = self._trace.block_size // block_size
        if pieces == 1:
            return traced.block_keys
        count = -(-traced.input_len // block_size)
        keys = (key * pieces + piece for key in traced.block_keys for piece in range(pieces))
        return list(islice(keys, count))

    def _known(self, traced: TraceRequest, name: str) -> Any:
        """A field that the scheduling policy needs."""
        value = getattr(traced, name)
        if value is None:
            raise DataError(
                f"{self._trace}, line {traced.line}: the request has no {name}, which the "
                f"scheduling policy {self.engine.config.policy} looks at"
            )
        return value
