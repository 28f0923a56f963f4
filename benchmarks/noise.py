"""What disturbed a run: the machine's other work, and the client itself.

Sits beside the load while it is driven. A figure that moved because a neighbour took the processor,
or because the client could not keep up with the stamps, should say so itself. Everything that this
system does not tell (other systems have no /proc) is None.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["LagMeter", "NoiseMeter", "cpu_shares", "warnings_of"]

LAG_PERIOD_S = 0.02
MAX_LAG_MS = 10.0
"""A client that is later than this in one of a hundred looks is a bottleneck."""
MAX_CLIENT_CPU_PERCENT = 90.0
"""Of one core: the client is one thread, and has no more."""
MAX_STEAL_PERCENT = 2.0
# Columns of the first line of /proc/stat (man 5 proc): steal is time that the host gave to others.
_IDLE, _IOWAIT, _STEAL, _NUM_COLUMNS = 3, 4, 7, 8


@dataclass(slots=True)
class LagMeter:
    """How late the event loop wakes: what a chunk's stamp may be late by."""

    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    lags_s: list[float] = field(default_factory=list)

    async def run(self) -> None:
        """Look every 20 ms until cancelled."""
        while True:
            due_s = self.clock() + LAG_PERIOD_S
            await self.sleep(LAG_PERIOD_S)
            self.lags_s.append(max(0.0, self.clock() - due_s))


class NoiseMeter:
    """Measures from its making to `report`; `lag.run()` is a task of the loop under load."""

    def __init__(self) -> None:
        self.lag = LagMeter()
        self._ticks = _ticks()
        self._start_s, self._cpu_s = time.perf_counter(), time.process_time()
        self._mhz = _frequencies()

    def report(self) -> dict[str, object]:
        """The result's `noise`: shares in percent of all cores, of one core for the client."""
        busy, steal = cpu_shares(self._ticks, _ticks())
        elapsed_s = max(1e-9, time.perf_counter() - self._start_s)
        mhz = [*self._mhz, *_frequencies()]
        lags_ms = np.array(self.lag.lags_s or [0.0]) * 1000.0
        return {
            "busy_percent": busy,
            "steal_percent": steal,
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "cpu_mhz": [min(mhz), max(mhz)] if mhz else None,
            "client_cpu_percent": 100.0 * (time.process_time() - self._cpu_s) / elapsed_s,
            "client_lag_p99_ms": float(np.percentile(lags_ms, 99)),
            "client_lag_max_ms": float(lags_ms.max()),
        }


def cpu_shares(before: list[int], after: list[int]) -> tuple[float | None, float | None]:
    """(busy, stolen) percent of the time of all cores between two looks at their ticks."""
    ticks = [late - early for early, late in zip(before, after, strict=True)]
    total = sum(ticks)
    if total <= 0:
        return None, None
    busy = total - ticks[_IDLE] - ticks[_IOWAIT] - ticks[_STEAL]
    return 100.0 * busy / total, 100.0 * ticks[_STEAL] / total


def warnings_of(noise: dict[str, object]) -> Iterator[str]:
    """What a reader of the figures must know, in sentences."""
    lag_ms, steal = noise["client_lag_p99_ms"], noise["steal_percent"]
    cpu = noise["client_cpu_percent"]
    if isinstance(lag_ms, float) and lag_ms > MAX_LAG_MS:
        is_busy = isinstance(cpu, float) and cpu > MAX_CLIENT_CPU_PERCENT / 2
        cause = "was a bottleneck" if is_busy else "waited for a processor that others had"
        yield (
            f"the client {cause}: it ran {lag_ms:.0f} ms late (p99), and so much of the "
            "latencies may be its own; load from another machine, or with fewer streams"
        )
    elif isinstance(cpu, float) and cpu > MAX_CLIENT_CPU_PERCENT:
        yield (
            f"the client was near its limit: it used {cpu:.0f} % of one core, and a little more "
            "load would show in the latencies; load from another machine, or with fewer streams"
        )
    if isinstance(steal, float) and steal > MAX_STEAL_PERCENT:
        yield (
            f"the host gave {steal:.1f} % of this machine's time to others: repeat the run, and "
            "compare only interleaved ones"
        )


def _ticks() -> list[int]:
    """Ticks of all cores together since the start, by column; zeros where the system hides them."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return [0] * _NUM_COLUMNS
    return [int(column) for column in first.split()[1 : _NUM_COLUMNS + 1]]


def _frequencies() -> list[float]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
