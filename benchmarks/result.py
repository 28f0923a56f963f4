"""The figures of a load test as one JSON document and as a table.

Keys are those of `vllm bench serve`, whose plot and CI scripts then read ours, and a few more
(docs/benchmarks.md lists them all). `DETAILED_KEYS` hold one entry per request and appear only in
a saved result, with `--save-detailed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

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
    "load_table",
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
    "generated_texts",
    "errors",
)
PACKAGES = ("aiohttp", "numpy")
RATES = ("request_throughput", "request_goodput", "output_throughput", "total_token_throughput")
LATENCY_TITLES = {
    "ttft": "TTFT: first token",
    "tpot": "TPOT: per token after it",
    "itl": "ITL: gap between chunks",
    "e2el": "E2E: last token",
    "ttft_from_send": "TTFT from the send",
    "e2el_from_send": "E2E from the send",
    "client_queue_time": "wait in the client",
}


def serve_result(
    options: ServeOptions,
    model: str,
    metrics: LoadMetrics,
    records: Sequence[RequestRecord],
    intervals: Mapping[str, Interval],
    noise: Mapping[str, object],
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


def load_table(
    options: ServeOptions, model: str, metrics: LoadMetrics, intervals: Mapping[str, Interval]
) -> str:
    """The run for a person to read: what was done, rates, and latencies in milliseconds."""
    rates, grid = _rates(metrics, intervals), _grid(options, metrics, intervals)
    return "\n".join([*_heading(options, model), "", *rates, "", *grid])


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


def _heading(options: ServeOptions, model: str) -> Iterator[str]:
    yield f"{model} at {options.base_url}{options.endpoint}"
    yield str(options.traffic)


def _rate(traffic: Traffic) -> float | str:
    """A number where it is one: `inf` is none in JSON, and a ramp or a trace has many."""
    if traffic.trace is not None or isinstance(traffic.request_rate, Ramp | Steps):
        return "varying"
    return traffic.request_rate if math.isfinite(traffic.request_rate) else "inf"


def _rates(metrics: LoadMetrics, intervals: Mapping[str, Interval]) -> Iterator[str]:
    def sure(key: str) -> str:
        interval = intervals.get(key)
        return f"  (95 %: {interval.low:.4g}-{interval.high:.4g})" if interval else ""

    counts = f"{metrics.completed} completed, {metrics.failed} failed"
    goodput = _number(metrics.request_goodput) + sure("request_goodput")
    total = f"{metrics.total_token_throughput:.1f}{sure('total_token_throughput')}"
    rows = [
        ("requests", f"{counts} in {metrics.duration_s:.2f} s"),
        ("failures", ", ".join(f"{n} x {kind}" for kind, n in metrics.errors_by_kind.items())),
        ("tokens", f"{metrics.total_input_tokens} in, {metrics.total_output_tokens} out"),
        ("requests/s", f"{metrics.request_throughput:.2f}{sure('request_throughput')}"),
        ("goodput, requests/s", goodput),
        ("output tokens/s", f"{metrics.output_throughput:.1f}{sure('output_throughput')}"),
        ("peak output tokens/s", f"{metrics.max_output_tokens_per_s:.1f}"),
        ("input + output tokens/s", total),
        ("most requests at once", f"{metrics.max_concurrent_requests}"),
    ]
    return (f"{name:<26}{value}" for name, value in rows if value not in ("", "-"))


def _grid(
    options: ServeOptions, metrics: LoadMetrics, intervals: Mapping[str, Interval]
) -> Iterator[str]:
    """A line of figures for each latency, and under it their intervals where there are any."""
    names = [name for name, _ in statistics_of(None, options.percentiles)]
    yield _row("milliseconds", names)
    for latency in options.latencies:
        values = statistics_of(metrics.latencies[latency], options.percentiles)
        yield _row(LATENCY_TITLES[latency], [_number(value) for _, value in values])
        sure = [intervals.get(f"{name}_{latency}_ms") for name in names]
        if any(sure):
            yield _row("  95 %", [f"{i.low:.4g}-{i.high:.4g}" if i else "" for i in sure])


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:<26}{''.join(f'{cell:>16}' for cell in cells)}".rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
