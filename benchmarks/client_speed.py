"""`llmserve bench client`: how many tokens a second the load generator itself can take.

A server that only streams (`paced_server.py`) runs in a process of its own, pinned to another core
where there is one; the client runs as in a load test, pinned to one. The rate rises until the
client no longer keeps up: it runs late, or tokens come back slower than they were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import orjson

from llmserve.errors import ConfigError
from llmserve.event_loop import run_loop

from .client import Client, Target
from .load import LoadState, drive_closed_loop
from .machine import command_line, machine, versions
from .noise import MAX_LAG_MS, NoiseMeter
from .workload import RandomLengths, random_prompts

__all__ = ["ClientSpeed", "ClientSpeedOptions", "bench_client", "measure_client", "parse_rates"]

PACED_SERVER = f"{__package__}.paced_server"
KEPT_SHARE = 0.97
"""Of the rate sent; the rest is the start and the end of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSpeedOptions:
    """What the client is tried with."""

    rates: tuple[float, ...] = (10_000, 25_000, 50_000, 75_000, 100_000)
    """Tokens per second over all streams together, ascending."""
    num_streams: int = 256
    output_len: int = 128
    """Mean tokens of an answer; they vary by half of it, so that streams do not end together."""
    seconds: float = 5.0
    """Of each rate."""

    def __post_init__(self) -> None:
        if self.num_streams < 1 or self.output_len < 1:
            raise ConfigError(
                f"--streams and --output-len must be at least 1, got {self.num_streams} and "
                f"{self.output_len}"
            )
        if not all(0 < rate < math.inf for rate in (*self.rates, self.seconds)):
            raise ConfigError("--rates and --seconds must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSpeed:
    """The client at one rate."""

    sent_rate: float
    """Tokens per second that the server was to send."""
    taken_rate: float
    """Tokens per second that came."""
    cpu_percent: float
    """Of one core."""
    lag_p99_ms: float
    """How late the client's loop woke."""
    failed: int

    @property
    def is_kept(self) -> bool:
        """Whether the client kept up."""
        is_fast = self.taken_rate >= KEPT_SHARE * self.sent_rate
        return is_fast and self.lag_p99_ms <= MAX_LAG_MS and not self.failed


def parse_rates(text: str) -> tuple[float, ...]:
    """Ascending rates from a text like `10000,50000`. Raises `ConfigError`."""
    try:
        return tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"--rates takes numbers like 10000,50000, got {text!r}") from None


def bench_client(options: ClientSpeedOptions) -> int:
    """Try each rate, print a table and, as the last line, JSON; 0: the client kept a rate."""
    print(f"{'sent, tokens/s':>16}{'taken':>12}{'one core':>10}{'late, p99':>12}")
    speeds = []
    for rate in options.rates:
        speed = measure_client(options, rate)
        speeds.append(speed)
        print(_line(speed), flush=True)
        if not speed.is_kept:
            break
    kept = max((speed.taken_rate for speed in speeds if speed.is_kept), default=None)
    result = {
        "benchmark": "client",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "num_streams": options.num_streams,
        "output_len": options.output_len,
        "kept": kept,
        "rates": [
            {"sent": one.sent_rate, "taken": one.taken_rate, "cpu_percent": one.cpu_percent,
             "lag_p99_ms": one.lag_p99_ms, "failed": one.failed, "kept": one.is_kept}
            for one in speeds
        ],
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }  # fmt: skip
    print(orjson.dumps(result).decode(), flush=True)
    return 0 if kept else 1


def measure_client(options: ClientSpeedOptions, rate: float) -> ClientSpeed:
    """The client against a server that sends `rate` tokens per second."""
    cores = _cores()
    with _server(rate, cores[-1:]) as url, _pinned(cores[:1]):
        return run_loop(_load(options, rate, url))


async def _load(options: ClientSpeedOptions, rate: float, url: str) -> ClientSpeed:
    per_stream = rate * options.seconds / options.num_streams / options.output_len
    count = options.num_streams * max(1, round(per_stream))
    lengths = RandomLengths(input_len=16, output_len=options.output_len, range_ratio=0.5)
    prompts = random_prompts(count, lengths, range(1000), seed=0)
    state = LoadState()
    async with Client(Target(base_url=url, model="paced")) as client:
        gc.collect()
        gc.freeze()
        noise = NoiseMeter()
        looking = asyncio.create_task(noise.lag.run())
        try:
            await drive_closed_loop(
                prompts, client.complete, state, max_concurrency=options.num_streams
            )
        finally:
            looking.cancel()
            gc.unfreeze()
        report = noise.report()
    times = np.sort([time_s for record in state.records for time_s in record.chunk_times_s])
    return ClientSpeed(
        sent_rate=rate,
        taken_rate=_steady_rate(times.tolist()),
        cpu_percent=float(str(report["client_cpu_percent"])),
        lag_p99_ms=float(str(report["client_lag_p99_ms"])),
        failed=state.num_failed,
    )


def _steady_rate(times_s: Sequence[float]) -> float:
    """Of the middle four fifths: streams begin and end together at both ends of a run."""
    edge = len(times_s) // 10
    middle = times_s[edge : len(times_s) - edge]
    return (len(middle) - 1) / (middle[-1] - middle[0]) if len(middle) > 1 else 0.0


@contextlib.contextmanager
def _server(rate: float, cores: Sequence[int]) -> Iterator[str]:
    """The URL of a paced server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        command = [sys.executable, "-m", PACED_SERVER, listener.fileno(), rate, *cores]
        process = subprocess.Popen(  # noqa: S603 - our own module
            [str(part) for part in command], pass_fds=[listener.fileno()], start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.kill()
            process.wait()


def _cores() -> list[int]:
    """What this process may use; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """This thread on `cores`; everywhere where none is named."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _line(speed: ClientSpeed) -> str:
    verdict = "" if speed.is_kept else "   not kept up with"
    return (
        f"{speed.sent_rate:>16,.0f}{speed.taken_rate:>12,.0f}{speed.cpu_percent:>9.0f}%"
        f"{speed.lag_p99_ms:>9.1f} ms{verdict}"
    )
