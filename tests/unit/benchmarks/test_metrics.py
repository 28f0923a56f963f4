"""Definitions against values computed by hand."""

from __future__ import annotations

import pytest

from llmserve.benchmarks.metrics import LATENCIES, compute_metrics, summarize
from support.records import make_failure, make_record

# Meant for 0 s, sent at 1 s: 3 chunks, 5 tokens. Meant for and sent at 2 s: one token.
FIRST = make_record([2.0, 2.5, 4.0], origin_s=0.0, sent_s=1.0, tokens=5, prompt_tokens=7)
SECOND = make_record([2.25], index=1, origin_s=2.0, tokens=1, prompt_tokens=None)


def metrics_of(*records, slos_ms=None, duration_s=8.0, percentiles=(50.0, 99.0)):
    return compute_metrics(
        list(records), duration_s=duration_s, percentiles=percentiles, slos_ms=slos_ms
    )


def test_counts_and_rates_are_those_of_the_successes() -> None:
    metrics = metrics_of(FIRST, SECOND, make_failure("timeout"), make_failure("http_429"))
    assert (metrics.completed, metrics.failed) == (2, 2)
    assert metrics.errors_by_kind == {"http_429": 1, "timeout": 1}
    assert (metrics.total_input_tokens, metrics.total_output_tokens) == (7, 6)
    assert metrics.request_throughput == 2 / 8
    assert metrics.output_throughput == 6 / 8
    assert metrics.total_token_throughput == 13 / 8
    assert metrics.request_goodput is None


def test_latencies_have_their_definitions() -> None:
    latencies = metrics_of(FIRST, SECOND).latencies
    means = {name: latencies[name].mean for name in LATENCIES}
    assert means == pytest.approx(
        {
            "ttft": (2000 + 250) / 2,
            "tpot": 2000 / 4,  # (4.0 - 2.0) / (5 - 1); the single token has none
            "itl": (500 + 0 + 1500 + 0) / 4,  # 1, 2 and 2 tokens in the chunks
            "e2el": (4000 + 250) / 2,
            "ttft_from_send": (1000 + 250) / 2,
            "e2el_from_send": (3000 + 250) / 2,
            "client_queue_time": (1000 + 0) / 2,
        }
    )


def test_summary_is_of_the_population_with_linear_percentiles() -> None:
    summary = summarize([0.001, 0.002, 0.004, 0.009], [0, 50, 90, 100])
    assert summary is not None
    assert summary.mean == pytest.approx(4.0)
    assert summary.median == pytest.approx(3.0)
    assert summary.std == pytest.approx((38 / 4) ** 0.5)
    assert summary.percentiles == pytest.approx({0: 1.0, 50: 3.0, 90: 7.5, 100: 9.0})


def test_statistic_of_nothing_is_none() -> None:
    assert summarize([], [50]) is None
    metrics = metrics_of(make_failure("connection"))
    assert metrics.completed == 0
    assert set(metrics.latencies.values()) == {None}
    assert (metrics.max_output_tokens_per_s, metrics.max_concurrent_requests) == (0.0, 0)


@pytest.mark.parametrize(
    ("slos_ms", "good"),
    [
        ({"ttft": 2000}, 2),
        ({"ttft": 1999}, 1),
        ({"e2el": 249}, 0),
        ({"tpot": 499}, 1),  # one token has TPOT 0
        ({"ttft": 2000, "tpot": 499}, 1),
        ({"ttft": 250, "tpot": 0, "e2el": 250}, 1),
    ],
)
def test_goodput_counts_requests_that_meet_every_objective(
    slos_ms: dict[str, float], good: int
) -> None:
    assert metrics_of(FIRST, SECOND, slos_ms=slos_ms).request_goodput == good / 8


def test_peak_tokens_come_with_their_chunks() -> None:
    # Seconds count from the first send, at 1.0. FIRST has 1, 2 and 2 tokens in its chunks, two of
    # which came in the second [2, 3), where SECOND's token falls as well.
    assert metrics_of(FIRST, SECOND).max_output_tokens_per_s == 1 + 2 + 1


def test_peak_concurrency_counts_half_open_intervals() -> None:
    back_to_back = [make_record([1.0], origin_s=0.0), make_record([2.0], origin_s=1.0)]
    assert metrics_of(*back_to_back).max_concurrent_requests == 1
    overlapping = [*back_to_back, make_record([1.5], origin_s=0.5)]
    assert metrics_of(*overlapping).max_concurrent_requests == 2
