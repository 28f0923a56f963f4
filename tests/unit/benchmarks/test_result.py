from __future__ import annotations

import json
import math
import re
from datetime import datetime
from pathlib import Path

import pytest

from llmserve.benchmarks.arrivals import Ramp
from llmserve.benchmarks.load_markdown import load_markdown
from llmserve.benchmarks.load_table import load_table
from llmserve.benchmarks.metrics import compute_metrics
from llmserve.benchmarks.multi_turn import MultiTurn
from llmserve.benchmarks.options import ServeOptions
from llmserve.benchmarks.record import RequestRecord
from llmserve.benchmarks.result import (
    DETAILED_KEYS,
    detailed_result,
    result_filename,
    serve_result,
)
from llmserve.benchmarks.statistics import Interval
from llmserve.benchmarks.traffic import Traffic
from llmserve.benchmarks.workload import RandomLengths
from support.records import make_failure, make_record

DOCS = Path(__file__).parents[3] / "docs" / "benchmarks.md"
TRAFFIC = ("request_rate", "burstiness", "max_concurrency")
NOW = datetime(2026, 1, 2, 3, 4, 5)

# Out of order, as they end: the second prompt of the workload ended first.
RECORDS = [
    make_record([11.0, 12.0], index=1, origin_s=10.5, sent_s=10.75, tokens=2),
    make_failure("timeout", index=2),
    make_record([13.0, 13.5], index=0, origin_s=10.0, prompt_tokens=None),
]


def make_options(**changes: object) -> ServeOptions:
    traffic = {name: changes.pop(name) for name in TRAFFIC if name in changes}
    changes["traffic"] = Traffic(**traffic)  # type: ignore[arg-type]
    values = {"base_url": "http://h:1", "endpoint": "/v1/completions", "model": None, **changes}
    return ServeOptions(**values)  # type: ignore[arg-type]


def make_result(options: ServeOptions, records: list[RequestRecord]) -> dict[str, object]:
    metrics = compute_metrics(
        records, duration_s=4.0, percentiles=options.percentiles, slos_ms=options.slos_ms
    )
    return serve_result(
        options, "org/m", metrics, records, {}, {}, None, now=NOW, is_interrupted=False
    )


def documented_keys(heading: str) -> set[str]:
    """Keys in the first column of the table under `heading` of docs/benchmarks.md."""
    section = DOCS.read_text(encoding="utf-8").split(f"### {heading}\n")[1].split("\n#")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, flags=re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def test_keys_are_the_documented_ones() -> None:
    result = make_result(make_options(), RECORDS)
    statistics = {"mean", "median", "std", "p50", "p90", "p99"}
    latency_keys = {
        f"{s}_{name}_ms" for s in statistics for name in ("ttft", "tpot", "itl", "e2el")
    }
    assert set(result) - latency_keys == documented_keys("Result") - {"by_turn"}
    assert latency_keys < set(result)


def test_detailed_keys_are_the_documented_ones() -> None:
    detailed = detailed_result(RECORDS, start_s=10.0)
    assert set(detailed) == set(DETAILED_KEYS) == documented_keys("Detailed result")


def test_latency_keys_follow_the_names_and_percentiles_chosen() -> None:
    options = make_options(latencies=("itl", "client_queue_time"), percentiles=(25.0, 99.9))
    keys = {key for key in make_result(options, RECORDS) if key.endswith("_ms")}
    assert keys == {
        f"{statistic}_{name}_ms"
        for statistic in ("mean", "median", "std", "p25", "p99.9")
        for name in ("itl", "client_queue_time")
    }


def test_result_is_plain_json_even_when_everything_failed() -> None:
    result = make_result(make_options(slos_ms={"ttft": 1.0}), [make_failure("connection")])
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again["completed"] == 0
    assert again["mean_ttft_ms"] is None
    assert again["request_rate"] == "inf"
    assert again["request_goodput"] == 0.0
    assert again["output_lens_from"] == "none"


@pytest.mark.parametrize(
    ("records", "source"),
    [(RECORDS, "usage+chunks"), (RECORDS[:2], "usage"), (RECORDS[1:], "chunks")],
)
def test_source_of_the_output_lens_from_is_told(records: list[RequestRecord], source: str) -> None:
    assert make_result(make_options(), records)["output_lens_from"] == source


def test_details_are_in_the_order_of_the_workload() -> None:
    detailed = detailed_result(RECORDS, start_s=10.0)
    assert detailed == {
        "input_lens": [0, 10, 10 - 10],
        "output_lens": [2, 2, 0],
        "start_times": [0.0, 0.5, -10.0],
        "ttfts": [3.0, 0.5, 0.0],
        "itls": [[0.5], [1.0], []],
        "latencies": [3.5, 1.5, 0.0],
        "queue_times": [0.0, 0.25, 0.0],
        "turns": [0, 0, 0],
        "generated_texts": ["xx", "xx", ""],
        "errors": ["", "", "a failure of kind timeout"],
    }


def test_file_name_tells_label_rate_concurrency_model_and_date() -> None:
    options = make_options(request_rate=2.5, max_concurrency=8, label="a")
    assert result_filename(options, "org/m:1", NOW) == (
        "a-2.5qps-concurrency8-m_1-20260102-030405.json"
    )
    assert result_filename(make_options(), "m", NOW) == "openai-infqps-m-20260102-030405.json"
    assert result_filename(make_options(result_filename="x.json"), "m", NOW) == "x.json"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"max_concurrency": 4}, "closed loop: 4 at a time"),
        ({}, "open loop: every request due at once"),
        ({"request_rate": 2.0}, "open loop: 2 requests/s (Poisson)"),
        (
            {"request_rate": 2.0, "burstiness": 0.5, "max_concurrency": 3},
            "open loop: 2 requests/s (gamma, shape 0.5), at most 3 at a time",
        ),
    ],
)
def test_table_says_what_the_load_was(changes: dict[str, object], line: str) -> None:
    options = make_options(**changes)
    metrics = compute_metrics(RECORDS, duration_s=4.0, percentiles=options.percentiles)
    assert load_table(options, "m", metrics, {}, {}).splitlines()[1] == line


def test_table_holds_the_figures() -> None:
    options = make_options(percentiles=(50.0,), latencies=("ttft", "tpot"))
    failed = [make_failure("http_429", index=i) for i in range(2)]
    metrics = compute_metrics([*RECORDS, *failed], duration_s=4.0, percentiles=(50.0,))
    lines = load_table(options, "m", metrics, {}, {}).splitlines()
    rows = {line[:26].strip(): line[26:].split() for line in lines}
    assert " ".join(rows["requests"]) == "2 completed, 3 failed in 4.00 s"
    assert " ".join(rows["failures"]) == "2 x http_429, 1 x timeout"
    assert rows["output tokens/s"] == ["1.0"]
    assert rows["milliseconds"] == ["mean", "median", "std", "p50"]
    assert rows["TTFT: first token"] == ["1750.00", "1750.00", "1250.00", "1750.00"]
    assert "goodput, requests/s" not in rows


def test_intervals_stand_beside_their_figures() -> None:
    options = make_options(percentiles=(50.0,), latencies=("ttft",))
    metrics = compute_metrics(RECORDS, duration_s=4.0, percentiles=(50.0,))
    intervals = {
        "output_throughput": Interval(0.5, 1.25),
        "median_ttft_ms": Interval(1600.0, 1800.0),
        "mean_itl_ms": Interval(1.0, 2.0),
    }
    result = serve_result(
        options, "m", metrics, RECORDS, intervals, {}, None, now=NOW, is_interrupted=False
    )  # fmt: skip
    assert result["intervals"] == {
        "output_throughput": [0.5, 1.25],
        "median_ttft_ms": [1600.0, 1800.0],
    }
    lines = load_table(options, "m", metrics, intervals, result).splitlines()
    assert "output tokens/s           1.0  (95 %: 0.5-1.25)" in lines
    assert lines[-1].split() == ["95", "%", "1600-1800"]
    assert lines[-1].index("1600-1800") + len("1600-1800") == 26 + 2 * 16  # under the median


def test_rate_is_a_number_when_finite() -> None:
    assert math.isfinite(make_result(make_options(request_rate=3.0), RECORDS)["request_rate"])  # type: ignore[arg-type]


def test_rate_that_changes_is_told_in_words() -> None:
    ramp = Ramp(strategy="linear", start=1.0, end=5.0)
    result = make_result(make_options(request_rate=ramp), RECORDS)
    assert result["request_rate"] == "varying"
    assert result["traffic"] == "open loop: linear ramp from 1 to 5 requests/s (Poisson)"


def test_lengths_default_to_the_documented_ones() -> None:
    assert make_options().lengths == RandomLengths(input_len=128, output_len=128)


def test_turns_and_server_are_told_in_words() -> None:
    options = make_options(multi_turn=MultiTurn(num_turns=2), max_concurrency=1)
    records = [
        make_record([1.0 + turn], index=turn, turn=turn, origin_s=0.0, prompt_tokens=10 + 90 * turn)
        for turn in (0, 1)
    ]
    result = make_result(options, records)
    assert result["by_turn"] == [
        {"turn": 0, "completed": 1, "mean_input_len": 10.0, "median_ttft_ms": 1000.0},
        {"turn": 1, "completed": 1, "mean_input_len": 100.0, "median_ttft_ms": 2000.0},
    ]
    result["server_metrics"] = {
        "num_requests_waiting": {"mean": 1.5, "max": 4.0},
        "kv_cache_usage_perc": {"mean": 0.25, "max": 0.5},
        "prefix_cache_queries": 200.0,
        "prefix_cache_hit_rate": 0.375,
    }
    metrics = compute_metrics(records, duration_s=4.0, percentiles=options.percentiles)
    lines = load_table(options, "m", metrics, {}, result).splitlines()
    assert lines[1] == "closed loop: 1 at a time, conversations of up to 2 turns"
    assert "turn 2                    1 requests, 100 tokens in, TTFT 2000.0 ms (median)" in lines
    assert "server: queue             1.5 on average, 4.0 at most" in lines
    assert "server: KV cache, %       25.0 on average, 50.0 at most" in lines
    assert "server: prefix hits       37.5% of 200 prompt tokens" in lines


def test_markdown_holds_the_same_figures_and_escapes_names() -> None:
    result = make_result(make_options(), RECORDS) | {"model_id": "a|b*c", "machine": {"cpu": "x"}}
    result["intervals"] = {"median_ttft_ms": [1600.0, 1800.0]}
    text = load_markdown(result, ["the client was late"])
    assert "# Load test of a\\|b\\*c" in text
    assert "**Warning:** the client was late" in text
    assert "**Failures:** 1 x timeout" in text
    assert "| output tokens/s | 1.00 |  |" in text
    assert "| milliseconds | mean | median | std | p50 | p90 | p99 |" in text
    assert "| TTFT: first token | 1750.00 | 1750.00 (1600 to 1800) | 1250.00 |" in text
