"""The figures of a load test as one JSON document.

Keys are those of `vllm bench serve`, whose plot and CI scripts then read ours, and a few more
(docs/benchmarks.md lists them all). `DETAILED_KEYS` hold one entry per request and appear only in
a saved result, with `--save-detailed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from statistics import fmean, median

from .arrivals import Ramp, Steps
from .machine import command_line, machine, versions
from .metrics import LoadMetrics, statistics_of
from .options import ServeOptions
from .record import RequestRecord
from .statistics import Interval
from .traffic import Traffic

__all__ = [
    "DETAILED_KEYS",
    "RATES",
    "detailed_result",
    "result_filename",
    "serve_result",
]

DETAILED_KEYS = (
    "input_lens",
    "output_lens",
    "start_times",
    "ttfts",
    "itls",
    "latencies",
    "queue_times",
    "turns",
    "generated_texts",
    "errors",
)
PACKAGES = ("numpy",)
RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")


def serve_result(
    options: ServeOptions,
    model: str,
    metrics: LoadMetrics,
    records: Sequence[RequestRecord],
    intervals: Mapping[str, Interval],
    noise: Mapping[str, object],
    server_metrics: Mapping[str, object] | None,
    *,
    now: datetime,
    is_interrupted: bool,
) -> dict[str, object]:
    """The JSON document of one run, without the per-request lists."""
    return {
        "date": now.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": model,
        "tokenizer_id": None,
        "base_url": options.base_url,
        "endpoint": options.endpoint,
        "num_prompts": options.traffic.num_prompts,
        "dataset_name": options.dataset_name,
        "multi_turn": None if options.multi_turn is None else str(options.multi_turn),
        "seed": options.seed,
        "traffic": str(options.traffic),
        "request_rate": _rate(options.traffic),
        "burstiness": options.traffic.burstiness,
        "max_concurrency": options.traffic.max_concurrency,
        "interrupted": is_interrupted,
        "duration": metrics.duration_s,
        "completed": metrics.completed,
        "failed": metrics.failed,
        "errors_by_kind": metrics.errors_by_kind,
        "output_lens_from": _output_lens_from(records),
        "tokens_per_chunk": _tokens_per_chunk(records),
        "chunk_tokens_from": _chunk_tokens_from(records),
        "total_input_tokens": metrics.total_input_tokens,
        "total_output_tokens": metrics.total_output_tokens,
        "request_throughput": metrics.request_throughput,
        "request_goodput": metrics.request_goodput,
        "output_throughput": metrics.output_throughput,
        "total_token_throughput": metrics.total_token_throughput,
        "max_output_tokens_per_s": metrics.max_output_tokens_per_s,
        "max_concurrent_requests": metrics.max_concurrent_requests,
        **(latencies := dict(_latency_items(options, metrics))),
        "intervals": {
            key: [interval.low, interval.high]
            for key, interval in intervals.items()
            if key in RATES or key in latencies
        },
        **({} if options.multi_turn is None else {"by_turn": _by_turn(records)}),
        "server_metrics": server_metrics,
        "noise": noise,
        "machine": machine(),
        "versions": versions(PACKAGES),
        "command": command_line(),
    }


def detailed_result(records: Sequence[RequestRecord], *, start_s: float) -> dict[str, object]:
    """One entry per request, in the workload's order. Times are seconds, from `start_s` on.

    A request without a token has 0.0 as its `ttfts` and `latencies`; `errors` says why.
    """
    ordered = sorted(records, key=lambda record: record.index)
    return {
        "input_lens": [record.prompt_tokens or 0 for record in ordered],
        "output_lens": [record.output_tokens if record.is_success else 0 for record in ordered],
        "start_times": [record.origin_s - start_s for record in ordered],
        "ttfts": [record.ttft_s if record.chunk_times_s else 0.0 for record in ordered],
        "itls": [record.itls_s for record in ordered],
        "latencies": [record.e2e_s if record.chunk_times_s else 0.0 for record in ordered],
        "queue_times": [record.client_queue_s for record in ordered],
        "turns": [record.turn for record in ordered],
        "generated_texts": ["".join(record.texts) for record in ordered],
        "errors": [record.error for record in ordered],
    }


def result_filename(options: ServeOptions, model: str, now: datetime) -> str:
    """The name asked for, or one made of label, rate, concurrency, model and date."""
    if options.result_filename:
        return options.result_filename
    limit = options.traffic.max_concurrency
    concurrency = f"-concurrency{limit}" if limit else ""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in model.split("/")[-1])
    date = now.strftime("%Y%m%d-%H%M%S")
    label = options.label or options.backend
    return f"{label}-{_rate(options.traffic)}qps{concurrency}-{name}-{date}.json"


def _latency_items(options: ServeOptions, metrics: LoadMetrics) -> Iterator[tuple[str, object]]:
    for name in options.latencies:
        summary = metrics.latencies[name]
        for statistic, value in statistics_of(summary, options.percentiles):
            yield f"{statistic}_{name}_ms", value


def _output_lens_from(records: Sequence[RequestRecord]) -> str:
    """Where the output token counts come from: the server's usage, one per chunk, or both."""
    sources = {
        "usage" if record.completion_tokens is not None else "chunks"
        for record in records
        if record.is_success
    }
    return "+".join(sorted(sources, reverse=True)) or "none"


def _tokens_per_chunk(records: Sequence[RequestRecord]) -> float | None:
    good = [record for record in records if record.is_success]
    num_chunks = sum(len(record.chunk_times_s) for record in good)
    return sum(record.output_tokens for record in good) / num_chunks if num_chunks else None


def _chunk_tokens_from(records: Sequence[RequestRecord]) -> str:
    """How the tokens of each chunk are known: told by the server, spread evenly, or both."""
    sources = {"server" if record.is_told else "even" for record in records if record.is_success}
    return "+".join(sorted(sources, reverse=True)) or "none"


def _by_turn(records: Sequence[RequestRecord]) -> list[dict[str, object]]:
    """What each turn of the conversations cost: their history grows."""
    good = [record for record in records if record.is_success]
    turns: list[dict[str, object]] = []
    for turn in sorted({record.turn for record in good}):
        these = [record for record in good if record.turn == turn]
        lens = [record.prompt_tokens for record in these if record.prompt_tokens is not None]
        turns.append(
            {
                "turn": turn,
                "completed": len(these),
                "mean_input_len": fmean(lens) if lens else None,
                "median_ttft_ms": 1000.0 * median(record.ttft_s for record in these),
            }
        )
    return turns


def _rate(traffic: Traffic) -> float | str:
    """A number where it is one: `inf` is none in JSON, and a ramp or a trace has many."""
    if traffic.trace is not None or isinstance(traffic.request_rate, Ramp | Steps):
        return "varying"
    return traffic.request_rate if math.isfinite(traffic.request_rate) else "inf"
