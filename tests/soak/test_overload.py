"""R10 through sockets: twenty times as many requests as can be served, in an open loop.

First the capacity is measured with as many clients as there is room for; then requests come at
twenty times that rate, whether or not any are answered. `LLMSERVE_SOAK_S` sets the seconds of
overload. The figures are printed (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import pytest

from support.models import make_model_folder
from support.serving import ServeProcess, serving

pytestmark = [pytest.mark.soak, pytest.mark.http, pytest.mark.timeout(900)]

DURATION_S = float(os.environ.get("LLMSERVE_SOAK_S", "60"))
CAPACITY_S = 8.0
OVERLOAD = 20
NUM_RUNNING = 8
STEP_S = 0.02
NUM_TOKENS = 32
BODY = {"prompt": [5, 6, 7], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
LEAST_GOODPUT = 0.9
MOST_GROWTH_BYTES = 32 << 20
SETTLE_S = 5.0
"""Time in which memory may still grow to what the load needs."""


@dataclass
class Outcomes:
    """What became of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    texts: set[str] = field(default_factory=set)
    ended: list[float] = field(default_factory=list)
    """When the answered ones ended."""

    async def ask(self, session: aiohttp.ClientSession) -> None:
        async with session.post("/v1/completions", json=BODY) as reply:
            body = await reply.json()
            self.statuses[reply.status] += 1
            if reply.status == 200:
                self.texts.add(body["choices"][0]["text"])
                self.ended.append(time.monotonic())
            else:
                assert 1 <= int(reply.headers["retry-after"]) <= 60


def client(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0))


async def capacity(url: str) -> float:
    """Requests answered in a second with as many clients as there is room for."""
    outcomes, end = Outcomes(), time.monotonic() + CAPACITY_S

    async def work(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            await outcomes.ask(session)

    started = time.monotonic()
    async with client(url) as session:
        await asyncio.gather(*(work(session) for _ in range(NUM_RUNNING)))
    return len(outcomes.ended) / (time.monotonic() - started)


async def overload(url: str, rate: float, server: ServeProcess) -> tuple[Outcomes, list[int]]:
    """Requests at `rate` a second for the duration; and the server's memory, once a second."""
    outcomes, memory = Outcomes(), []
    started = time.monotonic()
    async with client(url) as session, asyncio.TaskGroup() as tasks:
        for index in range(int(rate * DURATION_S)):
            due = started + index / rate
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            tasks.create_task(outcomes.ask(session))
            if time.monotonic() - started > len(memory):
                memory.append(resident_bytes(server))
    return outcomes, memory


def resident_bytes(server: ServeProcess) -> int:
    processes = [psutil.Process(server.process.pid), *server.process_tree()]
    return sum(process.memory_info().rss for process in processes)


def test_r10_twenty_times_the_capacity(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "tiny")
    options = (
        "--runner", f"fake:{STEP_S}", "--max-num-seqs", str(NUM_RUNNING), "--limit",
        "max_waiting_requests=16", "--log-level", "warning",
    )  # fmt: skip
    with serving(folder, *options) as server:
        url = server.wait_until_ready()
        peak = asyncio.run(capacity(url))
        started = time.monotonic()
        outcomes, memory = asyncio.run(overload(url, OVERLOAD * peak, server))
        within = [ended for ended in outcomes.ended if ended - started < DURATION_S]
        goodput = len(within) / DURATION_S
        growth = max(memory[int(SETTLE_S) :]) - memory[int(SETTLE_S)]
        print(
            f"peak {peak:.1f} requests/s; at {OVERLOAD} times as many {goodput:.1f} answered, "
            f"{sum(outcomes.statuses.values())} in all, {dict(outcomes.statuses)}; "
            f"memory grew by {growth / 2**20:.1f} MiB after {SETTLE_S:g} s"
        )
        assert set(outcomes.statuses) == {200, 429}
        assert sum(outcomes.statuses.values()) == int(OVERLOAD * peak * DURATION_S)
        assert len(outcomes.texts) == 1, "an answer was not the one that it is alone"
        assert goodput >= LEAST_GOODPUT * peak
        assert growth <= MOST_GROWTH_BYTES
