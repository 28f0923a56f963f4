"""One load test of a server, from the first question to the exit code.

Order: wait for the server and learn its model, make the prompts, send one request to settle what
the server takes (`ready.py`), warm up, then drive the measured load (`load.py`) and report.
Ctrl-C during the load keeps and reports what has ended by then.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import orjson

from llmserve.console import console, progress
from llmserve.durable import write_bytes
from llmserve.errors import ConfigError, LLMServeError

from .arrivals import arrival_offsets
from .client import CHAT_ENDPOINT, Client, ServerError, Target
from .intervals import load_intervals
from .load import LoadState, drive_closed_loop, drive_open_loop
from .metrics import compute_metrics
from .noise import NoiseMeter, warnings_of
from .options import ServeOptions
from .page import load_page
from .ready import ServedModel, align_all, choose_model, first_request, list_models
from .result import detailed_result, load_table, result_filename, serve_result
from .trace_prompts import trace_prompts
from .workload import Prompt, RandomLengths, random_prompts, sample_ids, text_prompts

__all__ = ["Run", "bench_serve", "run_load"]

# The display is drawn on the thread that stamps the chunks: seldom, and only on a terminal.
REFRESH_S = 0.5


@dataclass(slots=True)
class Run:
    """What a run knows so far; an interrupted one is reported from it."""

    model: str = ""
    state: LoadState = field(default_factory=LoadState)
    noise: NoiseMeter = field(default_factory=NoiseMeter)
    """Counts from the run's making; made anew when the load begins."""


def bench_serve(options: ServeOptions) -> int:
    """Run the load test, print table and JSON, save the result; the exit code.

    0: every request succeeded. 1: some failed.

    Raises:
        LLMServeError: the load could not begin, or the result could not be saved.
        KeyboardInterrupt: interrupted; what had ended by then is printed and saved first.
    """
    run = Run()
    try:
        asyncio.run(run_load(options, run))
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
        request_timeout_s=options.request_timeout_s,
    )
    async with Client(target) as client:
        deadline_s = time.monotonic() + options.ready_timeout_s
        served = await _served_model(client, options, deadline_s)
        run.model = served.name
        client.target = replace(client.target, model=served.name)
        prompts = await _make_prompts(client, options, served)
        num_prompts = options.traffic.num_prompts
        prompts = await _settle(client, prompts, num_prompts, deadline_s)
        await _warm_up(client, options, prompts[num_prompts + 1 :])
        await _measure(client, options, run, prompts[:num_prompts])


async def _served_model(client: Client, options: ServeOptions, deadline_s: float) -> ServedModel:
    try:
        models = await list_models(client, deadline_s=deadline_s)
    except ServerError as error:
        if options.model is None or error.status not in (404, 405):
            raise
        models = []  # a server without the route can still be tested, once the model is named
    return choose_model(models, options.model)


async def _make_prompts(client: Client, options: ServeOptions, served: ServedModel) -> list[Prompt]:
    """The measured prompts, then one for the first request, then the warm-ups'."""
    count = 1 + options.num_warmups
    if options.dataset_path is not None:
        num_prompts = options.traffic.num_prompts + count
        return text_prompts(
            options.dataset_path, num_prompts, output_len=options.lengths.output_len
        )
    _check_lengths(options, served)
    ids = await _known_ids(client, options, served)
    if (trace := options.traffic.trace) is not None:
        recorded = trace_prompts(trace, ids, seed=options.seed)
        lengths = RandomLengths(input_len=len(recorded[0].content), output_len=1)
        prompts = recorded + random_prompts(count, lengths, ids, seed=options.seed)
    else:
        count += options.traffic.num_prompts
        prompts = random_prompts(count, options.lengths, ids, seed=options.seed)
    if options.endpoint == CHAT_ENDPOINT:
        return await align_all(client, prompts, _announce)
    return prompts


def _check_lengths(options: ServeOptions, served: ServedModel) -> None:
    """Refuse what cannot fit before anything is sent."""
    trace, limit = options.traffic.trace, served.max_model_len
    longest = options.lengths.most if trace is None else trace.size(1).max_len
    if limit is not None and longest > limit:
        cure = "--random-input-len or --random-output-len" if trace is None else "--length-scale"
        raise ConfigError(
            f"the longest prompt and answer make {longest} tokens; the context of "
            f"{served.name} is {limit}: lower {cure}"
        )


async def _known_ids(client: Client, options: ServeOptions, served: ServedModel) -> Sequence[int]:
    """Ids that the model has: all of them, or those of a sample text."""
    vocab_size = options.vocab_size or served.vocab_size
    if vocab_size is not None and options.endpoint != CHAT_ENDPOINT:
        return range(vocab_size)
    try:
        return await sample_ids(client)
    except ServerError as error:
        raise ServerError(
            f"no token ids to make random prompts from: the server neither tells its vocabulary's "
            f"size nor tokenizes ({error}); give --vocab-size, or use --dataset-name text",
            status=error.status,
        ) from error


async def _settle(
    client: Client, prompts: list[Prompt], first: int, deadline_s: float
) -> list[Prompt]:
    """`prompts` in a form that the server takes, tried out with the one at index `first`."""
    if await first_request(client, prompts[first], deadline_s=deadline_s, announce=_announce):
        return prompts
    prompts = await align_all(client, prompts, _announce)
    await first_request(client, prompts[first], deadline_s=deadline_s, announce=_announce)
    return prompts


async def _warm_up(client: Client, options: ServeOptions, prompts: Sequence[Prompt]) -> None:
    state = LoadState()
    concurrency = options.traffic.max_concurrency or max(1, len(prompts))
    await drive_closed_loop(prompts, client.complete, state, max_concurrency=concurrency)
    failed = [record for record in state.records if not record.is_success]
    if failed:
        raise ServerError(
            f"{len(failed)} of {len(prompts)} warm-up requests failed: {failed[0].error}"
        )


async def _measure(
    client: Client, options: ServeOptions, run: Run, prompts: Sequence[Prompt]
) -> None:
    gc.collect()
    gc.freeze()  # what exists now need not be walked again while chunks are stamped
    run.noise = NoiseMeter()
    beside = [
        asyncio.create_task(_display(run.state, len(prompts))),
        asyncio.create_task(run.noise.lag.run()),
    ]
    try:
        await _drive(client, options, run.state, prompts)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        gc.unfreeze()


async def _drive(
    client: Client, options: ServeOptions, state: LoadState, prompts: Sequence[Prompt]
) -> None:
    traffic, limit = options.traffic, options.traffic.max_concurrency
    if limit is not None and not traffic.is_open_loop:
        await drive_closed_loop(prompts, client.complete, state, max_concurrency=limit)
        return
    offsets_s = _offsets(options, len(prompts))
    await drive_open_loop(
        prompts, client.complete, state, offsets_s=offsets_s, max_concurrency=limit
    )


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


async def _display(state: LoadState, num_prompts: int) -> None:
    """Show progress on stderr until cancelled."""
    if not console().is_terminal:
        return
    bars = progress()
    bars.live.auto_refresh = False
    task = bars.add_task("load test", total=num_prompts, note="")
    with bars:
        try:
            while True:
                await asyncio.sleep(REFRESH_S)
                bars.update(task, completed=len(state.records), note=_note(state), refresh=True)
        finally:
            bars.update(task, completed=len(state.records), note=_note(state), refresh=True)


def _note(state: LoadState) -> str:
    elapsed_s = (state.end_s or time.perf_counter()) - state.start_s
    rate = state.num_tokens / elapsed_s if elapsed_s > 0 else 0.0
    return f"{state.num_running} running, {state.num_failed} failed, {rate:.0f} tokens/s ended"


def _report(options: ServeOptions, run: Run, *, is_interrupted: bool) -> int:
    """Print and save what the run found; the exit code."""
    now, state, noise = datetime.now(), run.state, run.noise.report()
    end_s = time.perf_counter() if state.end_s is None else state.end_s
    metrics = compute_metrics(
        state.records,
        duration_s=end_s - state.start_s,
        percentiles=options.percentiles,
        slos_ms=options.slos_ms,
    )
    intervals = load_intervals(
        state.records,
        start_s=state.start_s,
        duration_s=end_s - state.start_s,
        percentiles=options.percentiles,
        slos_ms=options.slos_ms,
    )
    result = serve_result(
        options,
        run.model,
        metrics,
        state.records,
        intervals,
        noise,
        now=now,
        is_interrupted=is_interrupted,
    )
    print(load_table(options, run.model, metrics, intervals))
    print(orjson.dumps(result).decode(), flush=True)
    if options.save_result:
        details = (
            detailed_result(state.records, start_s=state.start_s) if options.save_detailed else {}
        )
        path = (options.result_dir or Path()) / result_filename(options, run.model, now)
        _save(path, orjson.dumps(result | details, option=orjson.OPT_INDENT_2))
    warnings = list(warnings_of(noise))
    for warning in warnings:
        _announce(f"warning: {warning}")
    if options.html is not None:
        page = load_page(result, state.records, warnings, start_s=state.start_s)
        _save(options.html, page.encode())
    for kind, number in metrics.errors_by_kind.items():
        example = next(r.error for r in state.records if r.error_kind == kind)
        print(f"{number} requests failed ({kind}), the first so: {example}", file=sys.stderr)
    return 1 if metrics.failed else 0


def _save(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as error:
        raise LLMServeError(f"cannot save the result as {path}: {error}") from error
    _announce(f"saved as {path}")


def _announce(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
