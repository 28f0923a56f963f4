"""What a server will carry, from its costs: the simulator under the loads that are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmserve.event_loop import run_loop

from .arrivals import arrival_offsets
from .capacity import CapacityOptions, find_knee, num_requests_of
from .equal_requests import ClosedLoop, EqualRequests
from .simulation_report import num_in_time, request_latencies
from .simulator import SimulatedEngine, Simulation, simulate

__all__ = ["Knee", "LoopFigures", "predict_knee", "predict_loop", "sized_loop"]

NUM_DRAWS = 3
"""Random arrivals of each rate; its share of requests in time is over all of them."""
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFigures:
    """How a closed loop goes."""

    output_throughput: float
    """Output tokens/s."""
    ttft_ms: float
    """Median."""
    tpot_ms: float
    """Median; 0 for answers of one token."""
    attained: float
    """Share of the requests that met every objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """Where a server stops meeting its objectives, in requests/s."""

    met: float | None
    """Highest rate that meets them; None: none tried."""
    missed: float | None
    """Lowest that does not; None: all tried meet them."""

    @classmethod
    def of(cls, tried: dict[float, bool]) -> Knee:
        """From whether each rate met them."""
        met = [rate for rate, is_met in tried.items() if is_met]
        missed = [rate for rate, is_met in tried.items() if not is_met]
        return cls(met=max(met, default=None), missed=min(missed, default=None))

    @property
    def rate(self) -> float | None:
        """The middle of the two; None: not both were found."""
        if self.met is None or self.missed is None:
            return None
        return float((self.met * self.missed) ** 0.5)


def predict_loop(
    engine: SimulatedEngine, loop: ClosedLoop, slos_ms: Mapping[str, float]
) -> LoopFigures:
    """Simulate `loop`; `slos_ms` as `meets_slos` takes it, not empty."""
    simulation = _played(engine, loop)
    ttft_s, tpot_s, _, _ = request_latencies(simulation.times)
    num_good = num_in_time(simulation.times, slos_ms)
    assert num_good is not None, "no objective was given"
    return LoopFigures(
        output_throughput=loop.num_requests * loop.output_len / simulation.duration_s,
        ttft_ms=1e3 * float(np.median(ttft_s)),
        tpot_ms=1e3 * float(np.median(tpot_s)),
        attained=num_good / loop.num_requests,
    )


def sized_loop(engine: SimulatedEngine, loop: ClosedLoop, *, seconds: float) -> ClosedLoop:
    """`loop` with as many times its requests as take about `seconds`, at least once."""
    times = max(1.0, seconds / _played(engine, loop).duration_s)
    return replace(loop, num_requests=round(loop.num_requests * times))


def _played(engine: SimulatedEngine, loop: ClosedLoop) -> Simulation:
    requests = loop.requests
    size = requests.size(engine.block_size)
    return simulate(requests, size, engine, max_concurrency=loop.max_concurrency)


def predict_knee(
    engine: SimulatedEngine,
    wanted: CapacityOptions,
    *,
    input_len: int,
    output_len: int,
) -> Knee:
    """Search as `bench capacity` does, with `wanted.start_rate` first, in virtual time."""
    tried: dict[float, bool] = {}

    async def probe(rate: float) -> bool:
        tried[rate] = _share(engine, wanted, rate, input_len, output_len) >= wanted.attainment
        return tried[rate]

    run_loop(find_knee(probe, start_rate=wanted.start_rate, tolerance=TOLERANCE))
    return Knee.of(tried)


def _share(
    engine: SimulatedEngine, wanted: CapacityOptions, rate: float, input_len: int, output_len: int
) -> float:
    """Of the requests at `rate`, those in time."""
    count = num_requests_of(rate, wanted.probe_s)
    num_good = 0
    for seed in range(NUM_DRAWS):
        offsets_s = arrival_offsets(count, request_rate=rate, burstiness=1.0, seed=seed)
        requests = EqualRequests(
            arrivals_s=offsets_s.tolist(), input_len=input_len, output_len=output_len
        )
        simulation = simulate(requests, requests.size(engine.block_size), engine)
        num_good += num_in_time(simulation.times, wanted.slos_ms) or 0
    return num_good / (NUM_DRAWS * count)
