"""Drive the load: who is sent when, and never more at once than allowed.

Sits between the workload and the client. Both loops call `send(prompt, origin_s)`, where
`origin_s` is when the request was meant to go out (None: whenever it does), and collect what it
returns:

- closed loop: N clients, each sending its next request when its last one ended. A slow server
  slows the clients down, so a stall of it touches at most N requests.
- conversations: a closed loop whose clients speak several turns, with the server's own replies as
  history, and think between them.
- open loop: requests are due at times fixed beforehand. A stalled server does not stop them
  coming, and what they wait for it counts as their latency, even where `max_concurrency` holds
  them back in the client (no coordinated omission: G. Tene, "How NOT to measure latency").
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace

from .record import RequestRecord
from .workload import Message, Prompt

__all__ = ["LoadState", "Send", "drive_closed_loop", "drive_conversations", "drive_open_loop"]

Clock = Callable[[], float]
Send = Callable[[Prompt, float | None], Awaitable[RequestRecord]]

# Timers of the event loop are good to a millisecond; the rest of a wait is spent yielding.
TIMER_SLACK_S = 1e-3


@dataclass(slots=True)
class LoadState:
    """A run while it goes on; what it holds stays valid when the run is cut short."""

    start_s: float = 0.0
    """When the run began, on the clock of the records."""
    end_s: float | None = None
    """When it ended or was cut short; None while it goes on."""
    num_running: int = 0
    """Requests sent and not yet ended."""
    num_failed: int = 0
    """Requests that ended in failure."""
    num_tokens: int = 0
    """Output tokens of the requests that succeeded."""
    num_unsent: int = 0
    """Turns that were not sent because one before them failed."""
    records: list[RequestRecord] = field(default_factory=list)
    """Ended requests, in the order they ended."""

    def take(self, record: RequestRecord) -> None:
        """Enter a request that has ended."""
        self.records.append(record)
        if record.is_success:
            self.num_tokens += record.output_tokens
        else:
            self.num_failed += 1


async def drive_closed_loop(
    prompts: Sequence[Prompt],
    send: Send,
    state: LoadState,
    *,
    max_concurrency: int,
    clock: Clock = time.perf_counter,
) -> None:
    """Send all prompts in order, `max_concurrency` at a time."""
    remaining = iter(prompts)

    async def client() -> None:
        for prompt in remaining:
            await _send_one(prompt, send, state, None)

    clients = [client() for _ in range(min(max_concurrency, len(prompts)))]
    await _run_all(clients, state, clock)


async def drive_conversations(
    conversations: Sequence[Sequence[Prompt]],
    send: Send,
    state: LoadState,
    *,
    max_concurrency: int,
    think_s: Sequence[float],
    clock: Clock = time.perf_counter,
) -> None:
    """Hold all conversations in order, `max_concurrency` at a time.

    A turn is sent `think_s[index]` seconds after the reply before it; a failed one ends its
    conversation, for what would have followed cannot be known.
    """
    remaining = iter(conversations)

    async def client() -> None:
        for turns in remaining:
            history: tuple[Message, ...] = ()
            for place, prompt in enumerate(turns):
                if place:
                    await asyncio.sleep(think_s[prompt.index])
                record = await _send_one(replace(prompt, history=history), send, state, None)
                if not record.is_success:
                    state.num_unsent += len(turns) - place - 1
                    break
                history += (
                    {"role": "user", "content": str(prompt.content)},
                    {"role": "assistant", "content": "".join(record.texts)},
                )

    clients = [client() for _ in range(min(max_concurrency, len(conversations)))]
    await _run_all(clients, state, clock)


async def drive_open_loop(
    prompts: Sequence[Prompt],
    send: Send,
    state: LoadState,
    *,
    offsets_s: Sequence[float],
    max_concurrency: int | None = None,
    clock: Clock = time.perf_counter,
) -> None:
    """Send each prompt `offsets_s` seconds after the start, late only if `max_concurrency` says so.

    `offsets_s` is ascending and as long as `prompts`.
    """
    gate: AbstractAsyncContextManager[object] = (
        asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    )

    async def send_gated(prompt: Prompt, origin_s: float) -> None:
        async with gate:
            await _send_one(prompt, send, state, origin_s)

    async def pace() -> None:
        async with asyncio.TaskGroup() as group:
            for prompt, offset_s in zip(prompts, offsets_s, strict=True):
                origin_s = state.start_s + float(offset_s)
                await _sleep_until(origin_s, clock)
                group.create_task(send_gated(prompt, origin_s))

    await _run_all([pace()], state, clock)


async def _send_one(
    prompt: Prompt, send: Send, state: LoadState, origin_s: float | None
) -> RequestRecord:
    state.num_running += 1
    try:
        record = await send(prompt, origin_s)
        state.take(record)
    finally:
        state.num_running -= 1
    return record


async def _run_all(
    loops: Sequence[Coroutine[object, object, None]], state: LoadState, clock: Clock
) -> None:
    """Run `loops` to their end; a cancellation ends them all and still sets `end_s`."""
    state.start_s = clock()
    try:
        async with asyncio.TaskGroup() as group:
            for loop in loops:
                group.create_task(loop)
    finally:
        state.end_s = clock()


async def _sleep_until(when_s: float, clock: Clock) -> None:
    while (wait_s := when_s - clock()) > 0:
        await asyncio.sleep(wait_s - TIMER_SLACK_S if wait_s > TIMER_SLACK_S else 0)
