"""The figures of a load test as a table on the terminal.

`server_facts` and `turn_facts` are in words here for all reports: the page and the Markdown too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .metrics import LoadMetrics, statistics_of
from .options import ServeOptions
from .statistics import Interval

__all__ = ["LATENCY_TITLES", "load_table", "server_facts", "turn_facts"]

LATENCY_TITLES = {
    "ttft": "TTFT: first token",
    "tpot": "TPOT: per token after it",
    "itl": "ITL: gap between tokens",
    "e2el": "E2E: last token",
    "ttft_from_send": "TTFT from the send",
    "e2el_from_send": "E2E from the send",
    "client_queue_time": "wait in the client",
}


def load_table(
    options: ServeOptions,
    model: str,
    metrics: LoadMetrics,
    intervals: Mapping[str, Interval],
    result: Mapping[str, object],
) -> str:
    """The run for a person to read: what was done, rates, and latencies in milliseconds."""
    rates, grid = _rates(metrics, intervals), _grid(options, metrics, intervals)
    facts = [f"{name:<26}{value}" for name, value in server_facts(result)]
    turns = [f"{name:<26}{value}" for name, value in turn_facts(result)]
    parts = [list(_heading(options, model)), list(rates), facts, turns, list(grid)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def server_facts(result: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What the server's own metrics say, each by name and in words."""
    metrics = result.get("server_metrics")
    if not isinstance(metrics, dict):
        return
    for key, title, unit in (
        ("num_requests_running", "server: running", 1.0),
        ("num_requests_waiting", "server: queue", 1.0),
        ("kv_cache_usage_perc", "server: KV cache, %", 100.0),
    ):
        if found := metrics.get(key):
            yield title, f"{found['mean'] * unit:.1f} on average, {found['max'] * unit:.1f} at most"
    if (share := metrics.get("prefix_cache_hit_rate")) is not None:
        queries = metrics["prefix_cache_queries"]
        yield "server: prefix hits", f"{share:.1%} of {queries:.0f} prompt tokens"
    if preemptions := metrics.get("num_preemptions"):
        yield "server: preemptions", f"{preemptions:.0f}"
    if drafted := metrics.get("spec_decode_num_draft_tokens"):
        accepted = metrics.get("spec_decode_num_accepted_tokens", 0.0)
        yield "server: guesses right", f"{accepted / drafted:.1%} of {drafted:.0f}"


def turn_facts(result: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Of conversations: what each turn cost."""
    turns = result.get("by_turn")
    for one in turns if isinstance(turns, list) else []:
        prompt = "" if one["mean_input_len"] is None else f", {one['mean_input_len']:.0f} tokens in"
        yield (
            f"turn {one['turn'] + 1}",
            f"{one['completed']} requests{prompt}, TTFT {one['median_ttft_ms']:.1f} ms (median)",
        )


def _heading(options: ServeOptions, model: str) -> Iterator[str]:
    yield f"{model} at {options.base_url}{options.endpoint}"
    talk = f", {options.multi_turn}" if options.multi_turn is not None else ""
    yield f"{options.traffic}{talk}"


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
