"""The figures of simulations as one JSON document and as a table.

Names and definitions are those of `metrics.py`; `queue_time` is from the arrival to the step in
which a request's first token of work was scheduled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import numpy as np
import numpy.typing as npt

from .cost_model import CostModel
from .machine import command_line, machine, versions
from .metrics import Summary, meets_slos, statistics_of, summarize
from .simulation_options import UNBOUNDED, SimulationOptions
from .simulator import RequestTimes, Simulation
from .traces import Trace, TraceSize

__all__ = [
    "num_in_time",
    "request_latencies",
    "run_figures",
    "simulation_document",
    "simulation_table",
    "sweep_table",
]

PERCENTILES = (50.0, 90.0, 99.0)
TITLES = {
    "ttft": "TTFT: first token",
    "tpot": "TPOT: per token after it",
    "e2el": "E2E: last token",
    "queue_time": "wait in the queue",
}

Figures = dict[str, object]
FloatArray = npt.NDArray[np.float64]


def run_figures(simulation: Simulation, options: SimulationOptions, blocks: int | None) -> Figures:
    """One run's share of the document. `blocks` is the size asked for; None: unbounded."""
    stats, duration_s = simulation.stats, simulation.duration_s
    num_input, num_output = sum(simulation.times.input_len), sum(simulation.times.output_len)
    num_requests = len(simulation.times)
    num_good = num_in_time(simulation.times, options.slos_ms)
    return {
        "kv_cache_blocks": UNBOUNDED if blocks is None else blocks,
        "duration": duration_s,
        "busy": simulation.busy_s,
        "wall": simulation.wall_s,
        "completed": num_requests,
        "num_steps": stats.num_steps,
        "most_running": simulation.most_running,
        "num_preemptions": stats.num_preemptions,
        "num_prefill_tokens": stats.num_prefill_tokens,
        "num_decode_tokens": stats.num_decode_tokens,
        "request_throughput": num_requests / duration_s,
        "request_goodput": None if num_good is None else num_good / duration_s,
        "slo_attainment": None if num_good is None else num_good / num_requests,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "prefix_cache_block_hits": stats.num_prefix_block_hits,
        "prefix_cache_block_queries": stats.num_prefix_block_queries,
        "prefix_cache_block_hit_rate": _share(
            stats.num_prefix_block_hits, stats.num_prefix_block_queries
        ),
        "prefix_cache_token_hit_rate": _share(stats.num_prefix_hits, stats.num_prefix_queries),
        **dict(_latency_items(simulation.times)),
    }


def simulation_document(
    options: SimulationOptions,
    trace: Trace,
    size: TraceSize,
    cost: CostModel,
    runs: Sequence[Figures],
) -> Figures:
    """The JSON document."""
    return {
        "benchmark": "simulation",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "trace": str(trace.path),
        "trace_format": trace.format,
        "time_scale": trace.options.time_scale,
        "length_scale": float(trace.options.length_scale),
        "start": trace.options.start_s,
        "num_requests": size.num_requests,
        "last_arrival": size.last_arrival_s,
        "total_input_tokens": size.num_input_tokens,
        "total_output_tokens": size.num_output_tokens,
        "longest_request": size.max_len,
        "cost_model": cost.outside(),
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_batched_tokens,
        "scheduling_policy": options.policy,
        "prefix_caching": options.has_prefix_cache,
        "goodput_slos_ms": dict(options.slos_ms),
        "runs": list(runs),
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }


def simulation_table(document: Figures, run: Figures) -> str:
    """One run for a person to read."""
    return "\n".join([*_heading(document), "", *_rates(run), "", *_grid(run)])


def sweep_table(document: Figures, runs: Sequence[Figures]) -> str:
    """Several runs, a line each: what the size of the cache changes."""
    columns = {
        "KV blocks": "kv_cache_blocks",
        "block hits": "prefix_cache_block_hit_rate",
        "token hits": "prefix_cache_token_hit_rate",
        "preempted": "num_preemptions",
        "TTFT mean": "mean_ttft_ms",
        "TTFT p99": "p99_ttft_ms",
        "TPOT mean": "mean_tpot_ms",
        "within SLO": "slo_attainment",
    }
    lines = ["".join(f"{title:>12}" for title in columns)]
    lines += ["".join(f"{_cell(name, run[name]):>12}" for name in columns.values()) for run in runs]
    return "\n".join([*_heading(document), "", *lines, "", "TTFT and TPOT in milliseconds"])


def num_in_time(times: RequestTimes, slos_ms: Mapping[str, float]) -> int | None:
    """Requests that met every objective; None: no objective given."""
    if not slos_ms:
        return None
    ttft, tpot, e2e, _ = request_latencies(times)
    return sum(
        meets_slos(slos_ms, ttft_s=first, tpot_s=per_token, e2e_s=last)
        for first, per_token, last in zip(ttft, tpot, e2e, strict=True)
    )


def request_latencies(times: RequestTimes) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Seconds to the first token, per token after it (0 where there is none), to the last one,
    and in the queue."""
    arrival, scheduled, first, last = (
        np.frombuffer(column)
        for column in (
            times.arrival_s, times.scheduled_s, times.first_token_s, times.last_token_s,
        )
    )  # fmt: skip
    num_gaps = np.frombuffer(times.output_len, dtype=np.int64) - 1
    return (
        first - arrival,
        (last - first) / np.maximum(num_gaps, 1),
        last - arrival,
        scheduled - arrival,
    )


def _latency_items(times: RequestTimes) -> Iterator[tuple[str, float | None]]:
    ttft, tpot, e2e, queue = request_latencies(times)
    has_tpot = np.frombuffer(times.output_len, dtype=np.int64) > 1
    samples = {"ttft": ttft, "tpot": tpot[has_tpot], "e2el": e2e, "queue_time": queue}
    for name, values in samples.items():
        summary: Summary | None = summarize(values.tolist(), PERCENTILES)
        for statistic, value in statistics_of(summary, PERCENTILES):
            yield f"{statistic}_{name}_ms", value


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _heading(document: Figures) -> Iterator[str]:
    cost = document["cost_model"]
    assert isinstance(cost, dict)
    yield (
        f"{document['trace']}: {document['num_requests']} requests in "
        f"{document['last_arrival']:.0f} s, {document['total_input_tokens']} tokens in, "
        f"{document['total_output_tokens']} out"
    )
    yield "cost of a step: " + ",".join(f"{name}={value:.4g}" for name, value in cost.items())
    yield (
        f"engine: blocks of {document['block_size']} tokens, at most {document['max_num_seqs']} "
        f"sequences and {document['max_num_batched_tokens']} tokens in a step, "
        f"{document['scheduling_policy']}"
    )


def _rates(run: Figures) -> Iterator[str]:
    rows = [
        ("KV cache blocks", f"{run['kv_cache_blocks']}"),
        ("requests", f"{run['completed']} in {run['duration']:.2f} s"),
        ("simulated", f"{run['num_steps']} steps in {run['wall']:.1f} s"),
        ("requests/s", f"{run['request_throughput']:.2f}"),
        ("goodput, requests/s", _cell("request_goodput", run["request_goodput"])),
        ("requests within SLO", _cell("slo_attainment", run["slo_attainment"])),
        ("output tokens/s", f"{run['output_throughput']:.1f}"),
        ("input + output tokens/s", f"{run['total_token_throughput']:.1f}"),
        ("most sequences in a step", f"{run['most_running']}"),
        ("preemptions", f"{run['num_preemptions']}"),
        ("prefix cache hits, blocks", _hits(run)),
        ("prefix cache hits, tokens", _cell("rate", run["prefix_cache_token_hit_rate"])),
    ]
    return (f"{name:<26}{value}" for name, value in rows if value not in ("", "-"))


def _hits(run: Figures) -> str:
    hits, queries = run["prefix_cache_block_hits"], run["prefix_cache_block_queries"]
    share = _cell("rate", run["prefix_cache_block_hit_rate"])
    return f"{share} ({hits} of {queries})" if queries else "-"


def _grid(run: Figures) -> Iterator[str]:
    names = [name for name, _ in statistics_of(None, PERCENTILES)]
    yield f"{'milliseconds':<26}" + "".join(f"{name:>12}" for name in names)
    for latency, title in TITLES.items():
        cells = "".join(f"{_cell(name, run[f'{name}_{latency}_ms']):>12}" for name in names)
        yield f"{title:<26}{cells}"


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        is_share = name.endswith(("rate", "attainment"))
        return f"{value:.2%}" if is_share else f"{value:.2f}"
    return str(value)
