"""`llmserve bench capacity`: the highest rate of requests at which a server meets its objectives.

Each rate tried is an open-loop load test of its own. The rate doubles until the objectives are
missed, or halves until they are met, and then the bracket is bisected by equal factors. A queue
grows without end above what a server carries, and hardly at all below it, so the knee between them
is narrow; what noise is left shows in the probes, which are all reported.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import orjson

from llmserve.errors import ConfigError
from llmserve.event_loop import run_loop

from .machine import command_line, machine, versions
from .metrics import meets_slos
from .options import ServeOptions
from .record import RequestRecord
from .serve import Run, run_load

__all__ = [
    "CapacityOptions",
    "Probe",
    "bench_capacity",
    "find_knee",
    "judge",
    "num_requests_of",
    "probe_rate",
]

MAX_DOUBLINGS = 12
MIN_REQUESTS = 20
"""A share of fewer requests says little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityOptions:
    """What is looked for, and how closely."""

    slos_ms: Mapping[str, float]
    """Upper bounds by `metrics.SLO_NAMES`; a request must meet all."""
    attainment: float = 0.9
    """Share of the requests that must meet them, above 0 and at most 1; failures do not."""
    start_rate: float = 1.0
    """Requests/s of the first probe."""
    probe_s: float = 30.0
    """Seconds in which the requests of a probe are due."""
    tolerance: float = 0.1
    """The rates that do and do not meet the objectives lie at most so far apart, as a share."""

    def __post_init__(self) -> None:
        if not self.slos_ms:
            raise ConfigError("--slo must name an objective, as ttft:500,tpot:50")
        if not 0 < self.attainment <= 1:
            raise ConfigError(f"--attainment must be above 0, at most 1, got {self.attainment:g}")
        for name in ("start_rate", "probe_s", "tolerance"):
            if not 0 < getattr(self, name) < float("inf"):
                option = f"--{name.replace('probe_s', 'probe_seconds').replace('_', '-')}"
                raise ConfigError(f"{option} must be above 0, got {getattr(self, name):g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One rate tried."""

    rate: float
    """Requests/s."""
    num_requests: int
    attained: float
    """Share of the requests that met every objective."""
    goodput: float
    """These requests per second of the probe, its drain included."""
    is_met: bool
    """Whether the share was large enough."""


def bench_capacity(options: ServeOptions, wanted: CapacityOptions) -> int:
    """Search, print the probes and, as the last line, JSON; the exit code.

    0: a rate was found. 1: the objectives were missed at every rate tried.

    Raises:
        LLMServeError: a probe could not begin.
        KeyboardInterrupt: interrupted; the probes that had ended are printed first.
    """
    probes: list[Probe] = []

    async def probe(rate: float) -> bool:
        result = await probe_rate(options, wanted, rate, number=len(probes))
        probes.append(result)
        print(_line(result), file=sys.stderr, flush=True)
        return result.is_met

    try:
        run_loop(find_knee(probe, start_rate=wanted.start_rate, tolerance=wanted.tolerance))
    except KeyboardInterrupt:
        if probes:
            _report(options, wanted, probes, is_interrupted=True)
        raise
    return _report(options, wanted, probes, is_interrupted=False)


async def find_knee(
    probe: Callable[[float], Awaitable[bool]],
    *,
    start_rate: float,
    tolerance: float,
    factor: float = 2.0,
) -> None:
    """Call `probe` with rates until one that it affirms and one that it denies are near.

    `factor` (above 1) is by how much the rate changes as long as they all say the same; it ends
    without both after `MAX_DOUBLINGS` such changes of `start_rate`.
    """
    met, rate = await probe(start_rate), start_rate
    change = factor if met else 1.0 / factor
    for _ in range(MAX_DOUBLINGS):
        last, rate = rate, rate * change
        if await probe(rate) != met:
            break
    else:
        return
    low, high = sorted((last, rate))
    while high / low > 1.0 + tolerance:
        middle = (low * high) ** 0.5
        if await probe(middle):
            low = middle
        else:
            high = middle


def judge(
    records: Sequence[RequestRecord], wanted: CapacityOptions, *, rate: float, duration_s: float
) -> Probe:
    """What `records`, all requests of one probe, say of its rate."""
    num_good = sum(
        record.is_success
        and meets_slos(
            wanted.slos_ms, ttft_s=record.ttft_s, tpot_s=record.tpot_s, e2e_s=record.e2e_s
        )
        for record in records
    )
    attained = num_good / len(records)
    return Probe(
        rate=rate,
        num_requests=len(records),
        attained=attained,
        goodput=num_good / duration_s,
        is_met=attained >= wanted.attainment,
    )


def num_requests_of(rate: float, probe_s: float) -> int:
    """Requests of a probe at `rate`."""
    return max(MIN_REQUESTS, round(rate * probe_s))


async def probe_rate(
    options: ServeOptions, wanted: CapacityOptions, rate: float, *, number: int
) -> Probe:
    """Load the server at `rate` and judge it; `number` is the probe's, so that no two are alike."""
    run, count = Run(), num_requests_of(rate, wanted.probe_s)
    traffic = replace(options.traffic, request_rate=rate, num_prompts=count)
    await run_load(replace(options, traffic=traffic, seed=options.seed + number), run)
    duration_s = (run.state.end_s or 0.0) - run.state.start_s
    return judge(run.state.records, wanted, rate=rate, duration_s=duration_s)


def _report(
    options: ServeOptions,
    wanted: CapacityOptions,
    probes: Sequence[Probe],
    *,
    is_interrupted: bool,
) -> int:
    met = [probe.rate for probe in probes if probe.is_met]
    missed = [probe.rate for probe in probes if not probe.is_met]
    document = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "base_url": options.base_url,
        "endpoint": options.endpoint,
        "slos_ms": dict(wanted.slos_ms),
        "attainment": wanted.attainment,
        "interrupted": is_interrupted,
        "capacity": max(met, default=None),
        "missed_at": min(missed, default=None),
        "probes": [_item(probe) for probe in probes],
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }
    lines = [_line(probe) for probe in sorted(probes, key=lambda probe: probe.rate)]
    print("\n".join([*lines, "", *_verdict(wanted, met, missed)]))
    print(orjson.dumps(document).decode(), flush=True)
    return 0 if met else 1


def _verdict(
    wanted: CapacityOptions, met: Sequence[float], missed: Sequence[float]
) -> Iterator[str]:
    bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in wanted.slos_ms.items())
    asked = f"{bounds} for {wanted.attainment:.0%} of the requests"
    if not met:
        yield f"no rate tried meets {asked}"
    elif not missed:
        yield f"{max(met):.3g} requests/s meet {asked}; no rate tried does not"
    else:
        yield f"{max(met):.3g} requests/s meet {asked}; {min(missed):.3g} do not"
    if met and missed and max(met) > min(missed):
        yield "a lower rate missed what a higher one met: probe for longer (--probe-seconds)"


def _line(probe: Probe) -> str:
    verdict = "met" if probe.is_met else "missed"
    return (
        f"{probe.rate:>9.3f} requests/s  {probe.attained:>6.1%} of {probe.num_requests} in time"
        f"  goodput {probe.goodput:.2f}/s  {verdict}"
    )


def _item(probe: Probe) -> dict[str, object]:
    return {
        "rate": probe.rate,
        "num_requests": probe.num_requests,
        "attained": probe.attained,
        "goodput": probe.goodput,
        "met": probe.is_met,
    }
