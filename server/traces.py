"""Where a request's time went: which steps it took part in, and what else was in them.

The engine tells with every step what it computed; the latest requests keep the steps that were
theirs. Times are on one clock (`time.monotonic`), which both processes share. Nothing here holds a
token or a text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llmserve.engine.request import Request, RequestOutput

from .messages import BlocksMoved, Outputs

__all__ = ["MAX_REQUESTS", "RequestTrace", "TraceStore", "chrome_trace"]

MAX_REQUESTS = 256
MAX_EVENTS = 4096
"""Steps kept of one request; later ones are counted only."""

MICROSECONDS = 1e6

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of the engine, shared by all that took part."""

    started: float
    duration_s: float
    num_sequences: int
    num_tokens: int
    num_waiting: int


@dataclass(frozen=True, slots=True)
class _Event:
    """What a step did for a request: computed tokens `start`..`stop - 1` of a choice."""

    step: _Step
    kind: str
    """`prefill`, `decode`, `preempted`, or `handover`: KV blocks were copied."""
    choice: int
    start: int = 0
    stop: int = 0


@dataclass(slots=True, kw_only=True)
class RequestTrace:
    """One request of the engine."""

    request_id: str
    tenant: str
    arrival_time: float
    num_prompt_tokens: int
    block_size: int
    """Of the KV cache of the model that was asked."""
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_time: float | None = None
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reasons: dict[int, str] = field(default_factory=dict)
    """By choice."""
    events: list[_Event] = field(default_factory=list)
    num_events: int = 0

    def add(self, event: _Event) -> None:
        """Note what a step did."""
        self.num_events += 1
        if len(self.events) < MAX_EVENTS:
            self.events.append(event)

    def take(self, output: RequestOutput, step: _Step) -> None:
        """Note an output."""
        self.last_time = step.started + step.duration_s
        self.scheduled_time = self.scheduled_time or output.scheduled_time
        if output.choice_index == 0:
            self.num_cached_tokens = output.num_cached_tokens
        if output.token_ids:
            self.first_token_time = self.first_token_time or self.last_time
            self.num_output_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.finish_reasons[output.choice_index] = output.finish_reason.value

    @property
    def num_preemptions(self) -> int:
        """Times that a choice gave up its blocks."""
        return sum(event.kind == "preempted" for event in self.events)

    def as_dict(self) -> Json:
        """As `/requests/{id}/trace` tells it; times in seconds since arrival."""
        return {
            "request_id": self.request_id,
            **self.phases(),
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "cached_blocks": self.num_cached_tokens // self.block_size,
            "output_tokens": self.num_output_tokens,
            "finish_reasons": [reason for _, reason in sorted(self.finish_reasons.items())],
            "preemptions": self.num_preemptions,
            "steps_left_out": self.num_events - len(self.events),
            "steps": [
                self._told(event) for event in sorted(self.events, key=lambda one: one.step.started)
            ],
        }

    def phases(self) -> dict[str, float | None]:
        """How long it waited, read its prompt and wrote; None where it did not come so far."""
        times = (self.arrival_time, self.scheduled_time, self.first_token_time, self.last_time)
        queue_s, prefill_s, decode_s = (
            None if before is None or after is None else max(0.0, after - before)
            for before, after in pairwise(times)
        )
        total_s = None if self.last_time is None else self.last_time - self.arrival_time
        return {
            "queue_s": queue_s,
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "total_s": total_s,
        }

    def _told(self, event: _Event) -> Json:
        step = event.step
        return {
            "kind": event.kind,
            "choice": event.choice,
            "at_s": step.started - self.arrival_time,
            "duration_s": step.duration_s,
            "tokens": event.stop - event.start,
            "batch_sequences": step.num_sequences,
            "batch_tokens": step.num_tokens,
            "waiting": step.num_waiting,
        }


class TraceStore:
    """The latest requests, by the ids that their replies carry."""

    def __init__(self) -> None:
        self._traces: OrderedDict[str, RequestTrace] = OrderedDict()
        self._groups: dict[str, tuple[str, ...]] = {}

    def begin(self, requests: Sequence[Request], *, block_size: int) -> None:
        """Follow the engine requests of one HTTP request; its id is the first one's."""
        self._groups[requests[0].request_id] = tuple(one.request_id for one in requests)
        for request in requests:
            self._traces[request.request_id] = RequestTrace(
                request_id=request.request_id,
                tenant=request.tenant,
                arrival_time=request.arrival_time,
                num_prompt_tokens=len(request.prompt_token_ids),
                block_size=block_size,
            )
        while len(self._traces) > MAX_REQUESTS:
            request_id, _ = self._traces.popitem(last=False)
            self._groups.pop(request_id, None)

    def find(self, request_id: str, tenant: str) -> list[RequestTrace]:
        """The traces of a reply's id, its prefix or not; empty for what is not this tenant's."""
        ids = self._groups.get(request_id.rpartition("-")[2], ())
        found = [self._traces[one] for one in ids if one in self._traces]
        return [trace for trace in found if trace.tenant == tenant]

    def timing_of(self, request_id: str, tenant: str) -> dict[str, float | None] | None:
        """The phases of the prompt of a request that ended last; None: it is not kept."""
        traces = self.find(request_id, tenant)
        if not traces:
            return None
        return max(traces, key=lambda trace: trace.last_time or 0.0).phases()

    def note(self, event: Outputs) -> None:
        """Take what the engine says of a step."""
        work, stats = event.work, event.stats
        for moved in event.moved:
            self._note_copy(moved, stats.num_waiting)
        if work is None:
            return
        step = _Step(
            event.started, event.step_s, work.num_sequences, work.num_tokens, stats.num_waiting
        )
        prefilled = set()
        for request_id, choice, start, stop in work.chunks:
            prefilled.add((request_id, choice))
            self._add(request_id, _Event(step, "prefill", choice, start, stop))
        for request_id, choice in work.preempted:
            self._add(request_id, _Event(step, "preempted", choice))
        decodes: dict[tuple[int, int], _Event] = {}  # nearly all alike: made once a step
        for output in event.outputs:
            if (trace := self._traces.get(output.request_id)) is None:
                continue
            trace.take(output, step)
            choice, count = output.choice_index, len(output.token_ids)
            if count and (output.request_id, choice) not in prefilled:
                if (choice, count) not in decodes:
                    decodes[choice, count] = _Event(step, "decode", choice, 0, count)
                trace.add(decodes[choice, count])

    def _note_copy(self, moved: BlocksMoved, num_waiting: int) -> None:
        if (trace := self._traces.get(moved.request_id)) is not None:
            num_tokens = moved.num_blocks * trace.block_size
            step = _Step(moved.started, moved.seconds, 1, num_tokens, num_waiting)
            trace.add(_Event(step, "handover", 0, 0, num_tokens))

    def _add(self, request_id: str, event: _Event) -> None:
        if (trace := self._traces.get(request_id)) is not None:
            trace.add(event)


def chrome_trace(traces: Iterable[RequestTrace]) -> Json:
    """The same for `chrome://tracing` and Perfetto: a row for each choice of each prompt."""
    events = [
        event for number, trace in enumerate(traces) for event in _chrome_events(number, trace)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _chrome_events(number: int, trace: RequestTrace) -> Iterator[Json]:
    if trace.scheduled_time is not None:
        waited_s = trace.scheduled_time - trace.arrival_time
        yield _chrome_event(number, 0, "queue", trace.arrival_time, waited_s, {})
    for event in trace.events:
        step = event.step
        said: Json = {
            "tokens": event.stop - event.start,
            "batch_sequences": step.num_sequences,
            "batch_tokens": step.num_tokens,
        }
        started, duration_s = step.started, step.duration_s
        yield _chrome_event(number, event.choice, event.kind, started, duration_s, said)


def _chrome_event(
    process: int, thread: int, name: str, started: float, duration_s: float, said: Json
) -> Json:
    return {
        "name": name,
        "ph": "X",
        "ts": started * MICROSECONDS,
        "dur": duration_s * MICROSECONDS,
        "pid": process,
        "tid": thread,
        "args": said,
    }
