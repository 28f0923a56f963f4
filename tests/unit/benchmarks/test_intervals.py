"""Intervals of a load test's figures, on invented records of a known law."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.benchmarks.intervals import load_intervals
from llmserve.benchmarks.metrics import compute_metrics
from llmserve.benchmarks.record import RequestRecord
from support.records import make_failure, make_record

RATE, LENGTH = 20.0, 4


def poisson_run(rng: np.random.Generator, num_requests: int) -> list[RequestRecord]:
    """Requests at `RATE` per second, answered after an exponential 50 ms and then 10 ms a token."""
    origins = np.cumsum(rng.exponential(1 / RATE, num_requests)).tolist()
    firsts = rng.exponential(0.05, num_requests).tolist()
    return [
        make_record([o + f + 0.01 * step for step in range(LENGTH)], index=i, origin_s=o)
        for i, (o, f) in enumerate(zip(origins, firsts, strict=True))
    ]


def intervals_of(records: list[RequestRecord], **changes: object):
    ends = [record.chunk_times_s[-1] for record in records if record.chunk_times_s]
    values = {"start_s": 0.0, "duration_s": max(ends), "percentiles": (90.0,), "slos_ms": {}}
    return load_intervals(records, **(values | changes))  # type: ignore[arg-type]


def test_intervals_cover_rate_and_latency_in_about_95_of_100_runs() -> None:
    rng = np.random.default_rng(5)
    truths = {
        "request_throughput": RATE,
        "output_throughput": RATE * LENGTH,
        "mean_ttft_ms": 50.0,
        "p90_ttft_ms": 50.0 * np.log(10),
    }
    hits = dict.fromkeys(truths, 0)
    for _ in range(60):
        found = intervals_of(poisson_run(rng, 200))
        for key, truth in truths.items():
            hits[key] += found[key].low <= truth <= found[key].high
    assert all(number >= 52 for number in hits.values()), hits


def test_each_interval_holds_its_figure() -> None:
    records = [*poisson_run(np.random.default_rng(1), 150), make_failure("timeout", index=150)]
    duration_s = max(r.chunk_times_s[-1] for r in records[:-1])
    slos_ms = {"ttft": 50.0}
    found = intervals_of(records, slos_ms=slos_ms)
    metrics = compute_metrics(
        records, duration_s=duration_s, percentiles=(90.0,), slos_ms=slos_ms
    )  # fmt: skip
    for key in ("request_throughput", "request_goodput", "total_token_throughput"):
        assert found[key].low < getattr(metrics, key) < found[key].high
    ttft = metrics.latencies["ttft"]
    assert ttft is not None
    assert found["median_ttft_ms"].low < ttft.median < found["median_ttft_ms"].high
    assert found["mean_itl_ms"].low == pytest.approx(10.0)


def test_runs_too_short_have_none() -> None:
    records = poisson_run(np.random.default_rng(1), 9)
    assert intervals_of(records) == {}
    assert load_intervals(
        [make_failure("timeout")], start_s=0.0, duration_s=1.0, percentiles=(), slos_ms={}
    ) == {}  # fmt: skip
    assert "request_throughput" not in intervals_of(poisson_run(np.random.default_rng(1), 49))
