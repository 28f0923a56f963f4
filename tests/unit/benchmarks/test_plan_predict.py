"""Predictions against servers simple enough to be computed by hand."""

from __future__ import annotations

import pytest

from llmserve.benchmarks.capacity import CapacityOptions
from llmserve.benchmarks.cost_model import CostModel
from llmserve.benchmarks.equal_requests import ClosedLoop
from llmserve.benchmarks.plan_predict import Knee, predict_knee, predict_loop, sized_loop
from llmserve.benchmarks.simulator import SimulatedEngine


def engine(base_s: float, *, max_num_seqs: int) -> SimulatedEngine:
    return SimulatedEngine(
        cost=CostModel(base_s=base_s),
        block_size=16,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=64,
    )


def test_closed_loop_goes_as_the_steps_do() -> None:
    """Four clients, places for two: a request takes five steps, and waits for as many before."""
    loop = ClosedLoop(max_concurrency=4, num_requests=40, input_len=8, output_len=5)
    figures = predict_loop(engine(0.01, max_num_seqs=2), loop, {"ttft": 40.0})
    assert figures.output_throughput == pytest.approx(2 / 0.01)
    assert figures.tpot_ms == pytest.approx(10.0)
    assert figures.ttft_ms == pytest.approx(60.0)  # its own step, after the five of another
    assert figures.attained == pytest.approx(2 / 40)  # the first two alone waited for nobody


def test_loop_is_made_as_long_as_asked() -> None:
    loop = ClosedLoop(max_concurrency=2, num_requests=4, input_len=8, output_len=5)
    simulated = engine(0.01, max_num_seqs=2)
    assert sized_loop(simulated, loop, seconds=1.0).num_requests == 40
    assert sized_loop(simulated, loop, seconds=0.01) == loop


@pytest.mark.parametrize("base_s", [0.02, 0.002])
@pytest.mark.parametrize("start_rate", [3.0, 300.0])
def test_knee_is_where_the_queue_begins_to_grow(base_s: float, start_rate: float) -> None:
    wanted = CapacityOptions(
        slos_ms={"ttft": 5e3 * base_s}, start_rate=start_rate, probe_s=100 * base_s
    )
    knee = predict_knee(engine(base_s, max_num_seqs=1), wanted, input_len=8, output_len=1)
    assert knee.rate is not None
    assert 0.5 < knee.rate * base_s < 1.2  # the queue is at most five deep


def test_knee_that_is_not_there() -> None:
    wanted = CapacityOptions(slos_ms={"ttft": 5.0}, probe_s=1.0)
    knee = predict_knee(engine(0.02, max_num_seqs=1), wanted, input_len=8, output_len=1)
    assert (knee.met, knee.rate) == (None, None)
    assert Knee.of({1.0: True, 4.0: False, 2.0: True}) == Knee(met=2.0, missed=4.0)
    assert Knee(met=2.0, missed=8.0).rate == 4.0
