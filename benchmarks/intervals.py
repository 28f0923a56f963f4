"""The 95 % interval of each figure of a load test, from that one run.

Latencies: the requests are the units, in the order they were meant to be sent. Rates: the run's
time is cut into `NUM_SLICES` equal slices, and these are the units; the ramp at the start and the
drain at the end are among them, so that a short run's interval is wide. What would move from
this run to the next is not in any of them: repeat runs and compare (`compare.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .metrics import meets_slos, samples_by_request
from .record import RequestRecord
from .statistics import Interval, Pool, block_counts

__all__ = ["NUM_SLICES", "load_intervals"]

NUM_SLICES = 50
# Weights of one percentile: more values get fewer draws, down to the least that show 2.5 %.
MAX_WEIGHTS = 20_000_000
NUM_DRAWS = (200, 1000)


def load_intervals(
    records: Sequence[RequestRecord],
    *,
    start_s: float,
    duration_s: float,
    percentiles: Sequence[float],
    slos_ms: Mapping[str, float],
) -> dict[str, Interval]:
    """Interval by the figure's key in the result, for each figure that has enough behind it.

    `records`, `duration_s` and the others are those of `compute_metrics`; `start_s` is when the
    run began.
    """
    good = sorted((r for r in records if r.is_success), key=lambda record: record.origin_s)
    if not good:
        return {}
    found = _latency_intervals(good, percentiles)
    found |= _rate_intervals(good, start_s, duration_s, slos_ms)
    return {key: interval for key, interval in found.items() if interval is not None}


def _latency_intervals(
    good: Sequence[RequestRecord], percentiles: Sequence[float]
) -> dict[str, Interval | None]:
    found: dict[str, Interval | None] = {}
    for name, per_request in samples_by_request(good).items():
        units = np.repeat(np.arange(len(good)), [len(values) for values in per_request])
        values = np.array([value for values in per_request for value in values]) * 1000.0
        pool = Pool(values.tolist(), units.tolist())
        least, most = NUM_DRAWS
        num_draws = max(least, min(most, MAX_WEIGHTS // max(1, len(values))))
        counts = block_counts(len(good), num_draws=num_draws)
        found[f"mean_{name}_ms"] = pool.mean(counts)
        keys = ["median", *(f"p{percent:g}" for percent in percentiles)]
        intervals = pool.percentiles(counts, [50.0, *percentiles])
        found |= {f"{key}_{name}_ms": i for key, i in zip(keys, intervals, strict=True)}
    return found


def _rate_intervals(
    good: Sequence[RequestRecord],
    start_s: float,
    duration_s: float,
    slos_ms: Mapping[str, float],
) -> dict[str, Interval | None]:
    """Tokens count when their chunk came; a request, and its prompt, at its last chunk."""
    chunks = [time for record in good for time in record.chunk_times_s]
    per_chunk = [float(count) for record in good for count in record.chunk_tokens]
    ends = [record.chunk_times_s[-1] for record in good]
    in_time = [
        float(meets_slos(slos_ms, ttft_s=r.ttft_s, tpot_s=r.tpot_s, e2e_s=r.e2e_s)) for r in good
    ]
    inputs = [record.prompt_tokens or 0 for record in good]
    output_rate = _rates(chunks, per_chunk, start_s, duration_s)
    input_rate = _rates(ends, inputs, start_s, duration_s)
    rates = {
        "request_throughput": _rates(ends, [1.0] * len(ends), start_s, duration_s),
        "output_throughput": output_rate,
        "total_token_throughput": [i + o for i, o in zip(input_rate, output_rate, strict=True)],
    }
    if slos_ms:
        rates["request_goodput"] = _rates(ends, in_time, start_s, duration_s)
    if len(good) < NUM_SLICES:  # fewer than one request in a slice: slices would invent precision
        return {}
    counts = block_counts(NUM_SLICES)
    return {key: Pool(values, range(NUM_SLICES)).mean(counts) for key, values in rates.items()}


def _rates(
    times_s: Sequence[float], amounts: Sequence[float], start_s: float, duration_s: float
) -> list[float]:
    """Amount per second in each slice of the run."""
    edges = (start_s, start_s + duration_s)
    sums, _ = np.histogram(times_s, bins=NUM_SLICES, range=edges, weights=amounts)
    rates: list[float] = (sums * (NUM_SLICES / duration_s)).tolist()
    return rates
