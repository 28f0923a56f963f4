"""The real side of a plan: a server of the model, and closed loops and rates that it is put to.

Everything goes through the client and the figures of `bench serve`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from llmserve.errors import EngineError
from llmserve.event_loop import run_loop

from .capacity import CapacityOptions, find_knee, probe_rate
from .client import COMPLETIONS_ENDPOINT
from .equal_requests import ClosedLoop
from .metrics import compute_metrics
from .options import ServeOptions
from .plan_predict import Knee, LoopFigures
from .running_server import GREEDY, PeerServer
from .serve import Run, run_load
from .serving_cost import MeasuredLoop
from .traffic import Traffic
from .workload import RandomLengths

__all__ = ["PlannedServer", "serving"]

NEAR = 1.1
"""Between neighbouring rates that are tried, so that the knee is known to 5 % to either side."""
RECOVERY_S = 30.0
"""A server may refuse connections for a while after a rate that was far too high."""


class PlannedServer:
    """A running server that is put to loads; no two of them send the same prompts."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        self._seeds = count()

    def run(self, loop: ClosedLoop, slos_ms: Mapping[str, float]) -> LoopFigures:
        """Drive `loop`. Raises `EngineError` where a request fails."""
        run = self._drive(loop)
        metrics = compute_metrics(
            run.state.records,
            duration_s=_duration_s(run),
            percentiles=(50.0,),
            slos_ms=slos_ms,
        )
        ttft, tpot = metrics.latencies["ttft"], metrics.latencies["tpot"]
        assert ttft is not None, "every request succeeded"
        return LoopFigures(
            output_throughput=metrics.output_throughput,
            ttft_ms=ttft.median,
            tpot_ms=0.0 if tpot is None else tpot.median,
            attained=(metrics.request_goodput or 0.0) / metrics.request_throughput,
        )

    def time(self, loop: ClosedLoop) -> MeasuredLoop:
        """How long `loop` takes. Raises `EngineError` where a request fails."""
        return MeasuredLoop(loop=loop, duration_s=_duration_s(self._drive(loop)))

    def knee(self, wanted: CapacityOptions, *, input_len: int, output_len: int) -> Knee:
        """Search from `wanted.start_rate` on, in steps of `NEAR`."""
        tried: dict[float, bool] = {}

        async def probe(rate: float) -> bool:
            lengths = RandomLengths(input_len=input_len, output_len=output_len)
            options = self._options(lengths, Traffic())
            result = await probe_rate(options, wanted, rate, number=next(self._seeds))
            tried[rate] = result.is_met
            return result.is_met

        search = find_knee(probe, start_rate=wanted.start_rate, tolerance=NEAR - 1, factor=NEAR)
        run_loop(search)
        return Knee.of(tried)

    def _drive(self, loop: ClosedLoop) -> Run:
        run = Run()
        lengths = RandomLengths(input_len=loop.input_len, output_len=loop.output_len)
        traffic = Traffic(num_prompts=loop.num_requests, max_concurrency=loop.max_concurrency)
        run_loop(run_load(self._options(lengths, traffic, seed=next(self._seeds)), run))
        failed = [record for record in run.state.records if not record.is_success]
        if failed:
            raise EngineError(f"{len(failed)} requests failed, the first so: {failed[0].error}")
        return run

    def _options(self, lengths: RandomLengths, traffic: Traffic, *, seed: int = 0) -> ServeOptions:
        return ServeOptions(
            base_url=self._base_url,
            endpoint=COMPLETIONS_ENDPOINT,
            model=None,
            body=GREEDY,
            traffic=traffic,
            lengths=lengths,
            seed=seed,
            ready_timeout_s=RECOVERY_S,
        )


@contextmanager
def serving(arguments: tuple[str, ...]) -> Iterator[PlannedServer]:
    """`llmserve serve` with `arguments`, until the block ends.

    Raises:
        EngineError: it did not become ready; the message has the last line that it printed.
    """
    program = (sys.executable, "-m", "llmserve", "serve")
    server = PeerServer(
        scheme="",
        engine="llmserve serve",
        weights="",
        cache="",
        versions={},
        command=(*program, *arguments, "--port", "{port}"),
        environment=dict(os.environ),
        is_ours=True,
    )
    with (
        tempfile.TemporaryDirectory(prefix="llmserve-plan-") as folder,
        open(Path(folder) / "log", "wb") as log,
        server.start(log) as running,
    ):
        running.wait()
        yield PlannedServer(running.base_url)


def _duration_s(run: Run) -> float:
    assert run.state.end_s is not None, "the load has ended"
    return run.state.end_s - run.state.start_s
