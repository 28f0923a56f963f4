"""One load test of a server, from the first question to the exit code.

Order: wait for the server and learn its model (`ready.py`), make the prompts and settle what the
server takes (`load_prompts.py`), warm up, then drive the measured load (`load.py`) and report
(`load_report.py`). Ctrl-C during the load keeps and reports what has ended by then.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace

from llmserve.event_loop import run_loop

from .arrivals import arrival_offsets
from .client import Client, ServerError, Target
from .live_view import show_load
from .load import LoadState, drive_closed_loop, drive_conversations, drive_open_loop
from .load_prompts import Workload, make_workload
from .load_report import report_load
from .noise import NoiseMeter
from .options import ServeOptions
from .ready import ServedModel, choose_model, list_models
from .scrape import METRICS_PATH, Scraper
from .workload import Prompt

__all__ = ["Run", "bench_serve", "run_load"]

SCRAPE_TIMEOUT_S = 2.0


@dataclass(slots=True)
class Run:
    """What a run knows so far; an interrupted one is reported from it."""

    model: str = ""
    state: LoadState = field(default_factory=LoadState)
    noise: NoiseMeter = field(default_factory=NoiseMeter)
    """Counts from the run's making; made anew when the load begins."""
    scraper: Scraper | None = None
    """What the server said of itself; None: the load has not begun."""


def bench_serve(options: ServeOptions) -> int:
    """Run the load test, print table and JSON, save the result; the exit code.

    0: every request succeeded. 1: some failed.

    Raises:
        LLMServeError: the load could not begin, or the result could not be saved.
        KeyboardInterrupt: interrupted; what had ended by then is printed and saved first.
    """
    run = Run()
    try:
        run_loop(run_load(options, run))
    except KeyboardInterrupt:
        if run.state.records:
            _report(options, run, is_interrupted=True)
        raise
    return _report(options, run, is_interrupted=False)


async def run_load(options: ServeOptions, run: Run) -> None:
    """Prepare and drive the load; `run` holds what came of it, also when this is cancelled.

    Raises:
        LLMServeError: the load could not begin.
    """
    target = Target(
        base_url=options.base_url,
        endpoint=options.endpoint,
        headers=options.headers,
        body=options.body,
        continuous_usage=options.continuous_usage,
        request_timeout_s=options.request_timeout_s,
    )
    async with Client(target) as client:
        deadline_s = time.monotonic() + options.ready_timeout_s
        served = await _served_model(client, options, deadline_s)
        run.model = served.name
        client.target = replace(client.target, model=served.name)
        workload = await make_workload(
            client, options, served, deadline_s=deadline_s, announce=_announce
        )
        await _warm_up(client, options, workload.warmups)
        await _measure(client, options, run, workload)


async def _served_model(client: Client, options: ServeOptions, deadline_s: float) -> ServedModel:
    try:
        models = await list_models(client, deadline_s=deadline_s)
    except ServerError as error:
        if options.model is None or error.status not in (404, 405):
            raise
        models = []  # a server without the route can still be tested, once the model is named
    return choose_model(models, options.model)


async def _warm_up(client: Client, options: ServeOptions, prompts: Sequence[Prompt]) -> None:
    state = LoadState()
    concurrency = options.traffic.max_concurrency or max(1, len(prompts))
    await drive_closed_loop(prompts, client.complete, state, max_concurrency=concurrency)
    failed = [record for record in state.records if not record.is_success]
    if failed:
        raise ServerError(
            f"{len(failed)} of {len(prompts)} warm-up requests failed: {failed[0].error}"
        )


async def _measure(client: Client, options: ServeOptions, run: Run, workload: Workload) -> None:
    run.scraper = Scraper(lambda: client.page(METRICS_PATH, timeout_s=SCRAPE_TIMEOUT_S))
    await run.scraper.look()
    gc.collect()
    gc.freeze()  # what exists now need not be walked again while chunks are stamped
    run.noise = NoiseMeter()
    beside = [
        asyncio.create_task(show_load(run.state, len(workload.prompts))),
        asyncio.create_task(run.noise.lag.run()),
        asyncio.create_task(run.scraper.run()),
    ]
    try:
        await _drive(client, options, run.state, workload)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        gc.unfreeze()
    if run.scraper.looks:
        await run.scraper.look()


def _drive(
    client: Client, options: ServeOptions, state: LoadState, workload: Workload
) -> Awaitable[None]:
    traffic, prompts = options.traffic, workload.prompts
    limit, send = traffic.max_concurrency, client.complete
    if limit is not None and options.multi_turn is not None:
        think_s = options.multi_turn.think_times_s(len(prompts), seed=options.seed)
        return drive_conversations(
            workload.conversations, send, state, max_concurrency=limit, think_s=think_s
        )
    if limit is not None and not traffic.is_open_loop:
        return drive_closed_loop(prompts, send, state, max_concurrency=limit)
    offsets_s = _offsets(options, len(prompts))
    return drive_open_loop(prompts, send, state, offsets_s=offsets_s, max_concurrency=limit)


def _offsets(options: ServeOptions, count: int) -> list[float]:
    """Seconds after the start at which each request is due."""
    traffic = options.traffic
    if traffic.trace is not None:
        return [request.arrival_s for request in traffic.trace]
    offsets_s: list[float] = arrival_offsets(
        count,
        request_rate=traffic.request_rate,
        burstiness=traffic.burstiness,
        seed=options.seed,
    ).tolist()
    return offsets_s


def _report(options: ServeOptions, run: Run, *, is_interrupted: bool) -> int:
    noise = run.noise.report()
    end_s = time.perf_counter() if run.state.end_s is None else run.state.end_s
    if run.scraper is not None and run.scraper.note:
        _announce(run.scraper.note)
    return report_load(
        options,
        run.model,
        run.state.records,
        noise,
        None if run.scraper is None else run.scraper.report(run.state.start_s),
        start_s=run.state.start_s,
        end_s=end_s,
        is_interrupted=is_interrupted,
    )


def _announce(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
