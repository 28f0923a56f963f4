"""Figures against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.benchmarks.cost_model import CostModel
from llmserve.benchmarks.simulation_options import SimulationOptions
from llmserve.benchmarks.simulation_report import (
    run_figures,
    simulation_document,
    simulation_table,
    sweep_table,
)
from llmserve.benchmarks.simulator import RequestTimes, Simulation
from llmserve.benchmarks.trace_formats import TraceRequest
from llmserve.benchmarks.traces import TraceOptions, open_trace
from llmserve.engine.engine import EngineStats
from support.traces import mooncake_trace

# arrival, scheduled, first token, last token; tokens in, out
REQUESTS = [
    (0.0, 1.0, 2.0, 6.0, 30, 5),  # TTFT 2, TPOT 1, E2E 6, 1 in the queue
    (1.0, 1.0, 2.0, 2.0, 10, 1),  # TTFT 1, no TPOT, E2E 1
    (2.0, 4.0, 6.0, 10.0, 20, 3),  # TTFT 4, TPOT 2, E2E 8, 2 in the queue
]


def simulation(**stats: int) -> Simulation:
    times = RequestTimes()
    for index, (arrival, scheduled, first, last, input_len, output_len) in enumerate(REQUESTS):
        times.add(
            TraceRequest(line=index, arrival_s=arrival, input_len=input_len, output_len=output_len)
        )
        times.scheduled_s[index] = scheduled
        times.first_token_s[index], times.last_token_s[index] = first, last
    values = {
        "num_running": 0,
        "num_waiting": 0,
        "num_waiting_tokens": 0,
        "num_free_blocks": 9,
        "num_blocks": 9,
        "num_steps": 17,
        "num_prefill_tokens": 60,
        "num_decode_tokens": 6,
        "num_preemptions": 2,
        "num_prefix_queries": 60,
        "num_prefix_hits": 15,
        "num_prefix_block_queries": 8,
        "num_prefix_block_hits": 2,
    }
    return Simulation(
        times=times,
        stats=EngineStats(**{**values, **stats}),
        num_blocks=9,
        duration_s=10.0,
        busy_s=8.0,
        most_running=2,
        wall_s=0.5,
    )


def options(**changes: object) -> SimulationOptions:
    return SimulationOptions(trace=None, cost_model="", **changes)  # type: ignore[arg-type]


def test_latencies_have_their_definitions() -> None:
    run = run_figures(simulation(), options(), None)
    assert run["mean_ttft_ms"] == pytest.approx((2000 + 1000 + 4000) / 3)
    assert run["median_ttft_ms"] == 2000
    assert run["mean_tpot_ms"] == pytest.approx((1000 + 2000) / 2)  # the single token has none
    assert run["mean_e2el_ms"] == pytest.approx((6000 + 1000 + 8000) / 3)
    assert run["mean_queue_time_ms"] == pytest.approx((1000 + 0 + 2000) / 3)


def test_rates_are_over_the_whole_duration() -> None:
    run = run_figures(simulation(), options(), 9)
    assert run["request_throughput"] == 3 / 10
    assert run["output_throughput"] == 9 / 10
    assert run["total_token_throughput"] == 69 / 10
    assert (run["kv_cache_blocks"], run["num_preemptions"], run["num_steps"]) == (9, 2, 17)
    assert run["prefix_cache_block_hit_rate"] == 2 / 8
    assert run["prefix_cache_token_hit_rate"] == 15 / 60


@pytest.mark.parametrize(
    ("slos_ms", "num_good"),
    [
        ({"ttft": 2000.0}, 2),
        ({"ttft": 1999.0}, 1),
        ({"tpot": 1000.0}, 2),  # without a TPOT it is met
        ({"tpot": 999.0}, 1),
        ({"e2el": 8000.0}, 3),
        ({"ttft": 4000.0, "tpot": 1500.0}, 2),
    ],
)
def test_goodput_counts_who_meets_every_objective(slos_ms: dict[str, float], num_good: int) -> None:
    run = run_figures(simulation(), options(slos_ms=slos_ms), None)
    assert run["request_goodput"] == pytest.approx(num_good / 10)
    assert run["slo_attainment"] == pytest.approx(num_good / 3)


def test_what_was_not_asked_or_cannot_be_known_is_none() -> None:
    stats = {"num_prefix_queries": 0, "num_prefix_block_queries": 0}
    run = run_figures(simulation(**stats), options(), None)
    assert run["request_goodput"] is None
    assert run["prefix_cache_block_hit_rate"] is None
    assert run["kv_cache_blocks"] == "unbounded"


def test_tables_show_the_documents_figures(tmp_path: Path) -> None:
    trace = open_trace(mooncake_trace(tmp_path / "m.jsonl", [(0, 600, 5, [0, 1])]), TraceOptions())
    asked = options(slos_ms={"ttft": 2000.0})
    runs = [run_figures(simulation(), asked, blocks) for blocks in (9, None)]
    cost = CostModel(base_s=0.01)
    document = simulation_document(asked, trace, trace.size(512), cost, runs)
    assert (document["num_requests"], document["cost_model"]) == (1, cost.outside())
    table = simulation_table(document, runs[0])
    assert "prefix cache hits, blocks 25.00% (2 of 8)" in table
    assert "requests within SLO       66.67%" in table
    assert table.count("\n") > 15
    lines = [line.split() for line in sweep_table(document, runs).splitlines()]
    row = ["25.00%", "25.00%", "2", "2333.33", "3960.00", "1500.00", "66.67%"]
    assert ["9", *row] in lines
    assert ["unbounded", *row] in lines
