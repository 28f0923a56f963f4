"""The two loops on a virtual clock against a server with a known law."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from llmserve.benchmarks.arrivals import arrival_offsets
from llmserve.benchmarks.load import (
    LoadState,
    drive_closed_loop,
    drive_conversations,
    drive_open_loop,
)
from llmserve.benchmarks.metrics import compute_metrics
from llmserve.benchmarks.record import RequestRecord
from llmserve.benchmarks.workload import Prompt
from support.virtual_time import run_virtual

Clock = Callable[[], float]
CLOCK_SLACK_S = 2e-3  # a millisecond of timers, and turns of the virtual loop


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(index=i, content=[1], num_tokens=1, output_len=1) for i in range(count)]


class LawfulServer:
    """Answers after `service_s`; whatever meets the stall [from, to) waits for its end."""

    def __init__(
        self, clock: Clock, service_s: Callable[[int], float], stall: tuple[float, float] = (0, 0)
    ) -> None:
        self.clock = clock
        self.service_s = service_s
        self.stall = stall
        self.num_running = 0
        self.most_running = 0
        self.order: list[int] = []

    async def send(self, prompt: Prompt, origin_s: float | None) -> RequestRecord:
        sent_s = self.clock()
        self.order.append(prompt.index)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        start, end = self.stall
        if start <= sent_s < end:
            await asyncio.sleep(end - sent_s)
        await asyncio.sleep(self.service_s(prompt.index))
        self.num_running -= 1
        return RequestRecord(
            index=prompt.index,
            origin_s=sent_s if origin_s is None else origin_s,
            sent_s=sent_s,
            chunk_times_s=[self.clock()],
            finish_reason="length",
        )


@pytest.mark.parametrize(("concurrency", "count"), [(1, 5), (4, 50), (16, 16), (64, 3)])
def test_closed_loop_keeps_the_concurrency_and_never_exceeds_it(
    concurrency: int, count: int
) -> None:
    async def main(clock: Clock) -> tuple[LawfulServer, LoadState]:
        server = LawfulServer(clock, lambda index: 0.01 * (1 + index % 7))
        state = LoadState()
        await drive_closed_loop(
            make_prompts(count), server.send, state, max_concurrency=concurrency, clock=clock
        )
        return server, state

    server, state = run_virtual(main)
    assert server.most_running == min(concurrency, count)
    assert server.order == list(range(count))
    assert sorted(record.index for record in state.records) == list(range(count))
    assert state.num_running == 0


def test_closed_loop_has_no_idle_client() -> None:
    async def main(clock: Clock) -> LoadState:
        server = LawfulServer(clock, lambda _: 0.25)
        state = LoadState()
        await drive_closed_loop(
            make_prompts(12), server.send, state, max_concurrency=3, clock=clock
        )
        return state

    state = run_virtual(main)
    assert state.end_s is not None
    assert state.end_s - state.start_s == pytest.approx(12 / 3 * 0.25, abs=CLOCK_SLACK_S)


def test_open_loop_sends_when_due_whatever_is_under_way() -> None:
    offsets = [0.0, 0.5, 0.5, 3.25]

    async def main(clock: Clock) -> list[RequestRecord]:
        server = LawfulServer(clock, lambda _: 10.0)
        state = LoadState()
        await drive_open_loop(make_prompts(4), server.send, state, offsets_s=offsets, clock=clock)
        assert server.most_running == 4
        return state.records

    records = run_virtual(main)
    assert [record.origin_s for record in records] == pytest.approx(offsets, abs=1e-4)
    assert [record.sent_s for record in records] == pytest.approx(offsets, abs=CLOCK_SLACK_S)
    assert all(record.sent_s >= record.origin_s for record in records)


def test_open_loop_counts_what_its_limit_held_back() -> None:
    async def main(clock: Clock) -> list[RequestRecord]:
        server = LawfulServer(clock, lambda _: 1.0)
        state = LoadState()
        await drive_open_loop(
            make_prompts(3), server.send, state, offsets_s=[0, 0, 0], max_concurrency=1, clock=clock
        )
        assert server.most_running == 1
        return state.records

    records = run_virtual(main)
    assert [record.client_queue_s for record in records] == pytest.approx([0, 1, 2], abs=1e-3)
    assert [record.e2e_s for record in records] == pytest.approx([1, 2, 3], abs=1e-3)


def test_stall_shows_in_the_tail_of_intended_latency_only() -> None:
    """Two seconds of stall in twenty at 50 requests/s, four connections: coordinated omission.

    Four requests see the stall; a hundred users do. From the send, p99 hides it; from the
    intended time, the requests due in the stall waited 1 s on average.
    """

    async def main(clock: Clock) -> list[RequestRecord]:
        server = LawfulServer(clock, lambda _: 0.01, stall=(9.0, 11.0))
        offsets = arrival_offsets(1000, request_rate=50.0, burstiness=1.0, seed=1)
        state = LoadState()
        await drive_open_loop(
            make_prompts(1000),
            server.send,
            state,
            offsets_s=offsets.tolist(),
            max_concurrency=4,
            clock=clock,
        )
        return state.records

    records = run_virtual(main)
    latencies = compute_metrics(records, duration_s=20.0, percentiles=[50.0, 99.0]).latencies
    whole, sent = latencies["ttft"], latencies["ttft_from_send"]
    assert whole is not None
    assert sent is not None
    assert sent.percentiles[99] < 50
    assert whole.percentiles[99] > 1500
    assert whole.percentiles[50] < 50
    due_in_stall = [record.ttft_s for record in records if 9.0 <= record.origin_s < 11.0]
    assert len(due_in_stall) > 50
    assert np.mean(due_in_stall) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("is_open", [False, True])
def test_cancelled_run_keeps_what_had_ended(is_open: bool) -> None:
    async def main(clock: Clock) -> tuple[LoadState, LawfulServer]:
        server = LawfulServer(clock, lambda _: 1.0)
        state = LoadState()
        prompts = make_prompts(10)
        run: Awaitable[None] = (
            drive_open_loop(
                prompts, server.send, state, offsets_s=[0.4 * i for i in range(10)], clock=clock
            )
            if is_open
            else drive_closed_loop(prompts, server.send, state, max_concurrency=2, clock=clock)
        )
        task = asyncio.ensure_future(run)
        await asyncio.sleep(2.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return state, server

    state, server = run_virtual(main)
    assert len(state.records) == 4
    assert state.num_running == 0
    assert state.end_s == pytest.approx(2.5, abs=CLOCK_SLACK_S)
    assert len(server.order) < 10


def test_conversations_carry_the_replies_and_pause_between_turns() -> None:
    prompts = [
        Prompt(index=i, content=f"q{i}", num_tokens=1, output_len=1, turn=i % 3) for i in range(6)
    ]
    sent: list[tuple[float, Prompt]] = []

    async def main(clock: Clock) -> LoadState:
        async def send(prompt: Prompt, origin_s: float | None) -> RequestRecord:
            assert origin_s is None
            sent.append((clock(), prompt))
            await asyncio.sleep(1.0)
            record = RequestRecord(index=prompt.index, turn=prompt.turn, finish_reason="stop")
            record.texts, record.chunk_times_s = [f"a{prompt.index}"], [clock()]
            if prompt.index == 4:
                record.fail("timeout", "too late")
            return record

        state = LoadState()
        talks, think_s = [prompts[:3], prompts[3:]], [9, 2, 3, 9, 2, 3]
        await drive_conversations(
            talks, send, state, max_concurrency=1, think_s=think_s, clock=clock
        )
        return state

    state = run_virtual(main)
    assert [prompt.index for _, prompt in sent] == [0, 1, 2, 3, 4]  # 5 would follow a failure
    assert (len(state.records), state.num_failed, state.num_unsent) == (5, 1, 1)
    times = [time_s for time_s, _ in sent]
    assert times == pytest.approx([0.0, 3.0, 7.0, 8.0, 11.0], abs=5 * CLOCK_SLACK_S)
    assert [message["content"] for message in sent[2][1].history] == ["q0", "a0", "q1", "a1"]
    assert [message["role"] for message in sent[1][1].history] == ["user", "assistant"]
    assert sent[3][1].history == ()
