"""Every request the engine has not finished yet, as the API process knows it.

For each one it keeps the request, the ids received so far and the prefix-cache hit first reported:
all that would be needed to hand it to another engine. Outputs leave through mailboxes; each choice
of each request ends exactly once, whoever ends it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.errors import EngineDeadError, OverloadedError
from llmserve.limits import Limits

from .mailbox import Mailbox
from .messages import Abort, AddRequest, Command, Finish

__all__ = ["DrainRate", "LiveRequest", "LiveRequests"]

MAX_RETRY_AFTER_S = 60.0


@dataclass(slots=True)
class LiveRequest:
    """A request and what has come of it."""

    request: Request
    mailbox: Mailbox
    output_token_ids: list[list[int]]
    """Ids received so far, one list per choice."""
    open_choices: set[int]
    """Choices that have not ended."""
    num_cached_tokens: int | None = None
    """Prefix-cache hit as the first choice first reported it."""
    has_output: bool = False
    replica: int = -1
    """Place of the engine that it was routed to; -1: none yet."""
    engine: int | None = None
    """Number of the engine that has it; None: it waits for one."""
    is_prefilling: bool = False
    """Whether its prompt is being computed by an engine that only reads."""
    scheduled_time: float | None = None
    """When that engine began with it; None: no such engine had it."""

    def resumed(self) -> Request:
        """The request as another engine is to take it up: a preempted sequence, to it."""
        choices = range(self.request.sampling_params.n)
        return replace(
            self.request,
            output_token_ids=[list(ids) for ids in self.output_token_ids],
            ended_choices=[index for index in choices if index not in self.open_choices],
            num_cached_tokens=self.num_cached_tokens,
        )


class DrainRate:
    """Sequences ended per second, over the last few."""

    def __init__(self, *, window: int = 64) -> None:
        self._times: deque[float] = deque(maxlen=window)

    def count(self, now: float) -> None:
        """Note that one ended."""
        self._times.append(now)

    def seconds_for(self, num_sequences: int, now: float) -> float:
        """Time until `num_sequences` more will have ended; 1..60, and 1 when nothing is known."""
        if len(self._times) < 2:
            return 1.0
        rate = len(self._times) / max(now - self._times[0], 1e-3)
        return min(max(1.0, math.ceil(num_sequences / rate)), MAX_RETRY_AFTER_S)


class LiveRequests:
    """The table, its bounds, and the only writer of commands about requests."""

    def __init__(self, send: Callable[[Command], None], *, limits: Limits, max_num_seqs: int):
        """`max_num_seqs` sequences can run at once; what is above them waits."""
        self._send = send
        self._limits = limits
        self._max_num_seqs = max_num_seqs
        self._live: dict[str, LiveRequest] = {}
        self._drain_rate = DrainRate()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_holds = 0
        self._closed_because: str | None = None
        self._refusal: OverloadedError | None = None
        self.num_sequences = 0
        """Choices that have not ended."""
        self.num_waiting_tokens = 0
        """Prompt tokens of requests that have no output yet."""
        self.busy_since = 0.0
        """When the table was last filled from empty (`time.monotonic`)."""

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(self._live.values())

    def get(self, request_id: str) -> LiveRequest | None:
        """The live request of that id."""
        return self._live.get(request_id)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._live

    async def wait_idle(self) -> None:
        """Return when nothing is in flight, nor to come of what is held open."""
        await self._idle.wait()

    def hold(self) -> None:
        """Have `wait_idle` wait until `release`: a client's request submits more as it goes on.

        Raises what `refuse` was given.
        """
        if self._refusal is not None:
            raise self._refusal
        self._num_holds += 1
        self._idle.clear()

    def release(self) -> None:
        """Undo one `hold`."""
        self._num_holds -= 1
        self._note_idle()

    def refuse(self, refusal: OverloadedError) -> None:
        """Let what is in flight end, held requests with all that they submit, and take nothing
        else: who comes is told `refusal`."""
        self._refusal = refusal

    def submit(
        self, requests: Sequence[Request], mailbox: Mailbox, *, is_held: bool = False
    ) -> None:
        """Hand all of `requests` to the engine, or none.

        `is_held` says that they are part of what a `hold` was taken for.

        Raises:
            OverloadedError: too much is waiting already, or nothing is taken any more.
            EngineDeadError: there is no engine to hand them to.
        """
        if self._refusal is not None and not is_held:
            raise self._refusal
        if self._closed_because is not None:
            raise EngineDeadError(self._closed_because)
        self._check_room(requests)
        if not self._live:
            self.busy_since = time.monotonic()
            self._idle.clear()
        for request in requests:
            num_choices = request.sampling_params.n
            self._live[request.request_id] = LiveRequest(
                request, mailbox, [[] for _ in range(num_choices)], set(range(num_choices))
            )
            self.num_sequences += num_choices
            self.num_waiting_tokens += len(request.prompt_token_ids)
            self._send(AddRequest(request))

    def abort(self, request_id: str) -> None:
        """End every open choice of a request as `abort`, now; the engine is told to forget it."""
        if request_id in self._live:
            self._send(Abort(request_id))
            self._end_all(request_id, FinishReason.ABORT, None)

    def abort_all(self) -> None:
        """End everything in flight as `abort`."""
        for request_id in list(self._live):
            self.abort(request_id)

    def finish(self, request_id: str, choice_index: int) -> None:
        """End one choice whose text met a stop string; its reader knows, so no output follows."""
        live = self._live.get(request_id)
        if live is not None and choice_index in live.open_choices:
            self._send(Finish(request_id, choice_index))
            self._close_choice(live, choice_index)

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Pass the engine's outputs on, token by token: a reader sees one at a time. Those of
        choices that have ended here are dropped."""
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None or output.choice_index not in live.open_choices:
                continue
            live.output_token_ids[output.choice_index] += output.token_ids
            if output.choice_index == 0 and live.num_cached_tokens is None:
                live.num_cached_tokens = output.num_cached_tokens
            if live.scheduled_time is not None:
                output.scheduled_time = live.scheduled_time
            self._note_first_output(live)
            if output.finish_reason is not None:
                self._close_choice(live, output.choice_index)
            for one in output.singly():
                live.mailbox.put(one)

    def expire(self, now: float) -> None:
        """End as `timeout` what no engine has and whose deadline has passed (`time.monotonic`)."""
        for live in list(self._live.values()):
            deadline = live.request.deadline
            if live.engine is None and deadline is not None and deadline <= now:
                self._end_all(live.request.request_id, FinishReason.TIMEOUT, None)

    def fail(self, request_id: str, error: str) -> None:
        """End every open choice of a request that no engine has any more as `error`."""
        if request_id in self._live:
            self._end_all(request_id, FinishReason.ERROR, error)

    def fail_all(self, error: str) -> None:
        """End everything in flight as `error`, and refuse what comes: the engine is gone."""
        self._closed_because = error
        for request_id in list(self._live):
            self._end_all(request_id, FinishReason.ERROR, error)

    def _check_room(self, requests: Sequence[Request]) -> None:
        if not self._live:
            return
        num_sequences = sum(request.sampling_params.n for request in requests)
        excess = (
            self.num_sequences
            + num_sequences
            - self._max_num_seqs
            - self._limits.max_waiting_requests
        )
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        is_over = self.num_waiting_tokens + num_tokens > self._limits.max_waiting_tokens
        if excess > 0 or (is_over and self.num_waiting_tokens):
            retry_after_s = self._drain_rate.seconds_for(max(1, excess), time.monotonic())
            raise OverloadedError(
                f"too many requests are waiting ({self.num_sequences} sequences in flight); "
                f"try again in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )

    def _end_all(self, request_id: str, reason: FinishReason, error: str | None) -> None:
        live = self._live[request_id]
        for choice_index in sorted(live.open_choices):
            self._close_choice(live, choice_index)
            live.mailbox.put(
                RequestOutput(
                    request_id=request_id,
                    choice_index=choice_index,
                    token_ids=[],
                    finish_reason=reason,
                    error=error,
                )
            )

    def _note_first_output(self, live: LiveRequest) -> None:
        if not live.has_output:
            live.has_output = True
            self.num_waiting_tokens -= len(live.request.prompt_token_ids)

    def _close_choice(self, live: LiveRequest, choice_index: int) -> None:
        live.open_choices.discard(choice_index)
        self.num_sequences -= 1
        self._drain_rate.count(time.monotonic())
        if not live.open_choices:
            self._note_first_output(live)
            del self._live[live.request.request_id]
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._live and not self._num_holds:
            self._idle.set()
