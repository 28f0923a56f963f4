"""The fit against servers whose cost law is known; nothing is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmserve.benchmarks.cost_model import CostModel
from llmserve.benchmarks.equal_requests import ClosedLoop
from llmserve.benchmarks.serving_cost import (
    MeasuredLoop,
    ServedSteps,
    ServingCost,
    fit_serving_cost,
)
from llmserve.benchmarks.simulator import SimulatedEngine, simulate

ENGINE = CostModel(base_s=1e-3, token_s=1e-5, context_s=1e-8)
SMALL_ENGINE = CostModel(base_s=2e-5, token_s=1e-5, context_s=1e-8, step_s=1e-4)
"""Its steps have several rounds."""
SIMULATED = SimulatedEngine(cost=ENGINE, block_size=16, max_num_seqs=8, max_batched_tokens=64)
# Prompts of several lengths, or the engine's own time could not be told from requests and tokens.
LOOPS = [
    ClosedLoop(max_concurrency=clients, num_requests=4 * clients, input_len=size, output_len=length)
    for clients in (1, 3, 8)
    for size, length in ((16, 3), (16, 24), (60, 3))
]


def duration_s(serving: ServingCost, loop: ClosedLoop, cost: CostModel = ENGINE) -> float:
    engine = replace(SIMULATED, cost=ServedSteps(cost, serving), entry_s=serving.entry_s)
    requests = loop.requests
    size = requests.size(16)
    simulation = simulate(requests, size, engine, max_concurrency=loop.max_concurrency)
    return simulation.duration_s


@pytest.mark.parametrize("engine", [ENGINE, SMALL_ENGINE])
@pytest.mark.parametrize(
    "serving",
    [
        ServingCost(),
        ServingCost(slowdown=0.4, step_s=1e-4, token_s=3e-5, request_s=2e-3),
        ServingCost(token_s=8e-5),
        ServingCost(step_s=5e-4, request_s=1e-3),
        ServingCost(slowdown=0.2, token_s=3e-5, prompt_token_s=4e-5),
        ServingCost(token_s=3e-5, request_s=1e-3, prompt_token_s=4e-5, entry_s=1e-3),
    ],
)
def test_costs_of_a_server_that_has_them_are_found(serving: ServingCost, engine: CostModel) -> None:
    measured = [
        MeasuredLoop(loop=loop, duration_s=duration_s(serving, loop, engine)) for loop in LOOPS
    ]
    fit = fit_serving_cost(SIMULATED, engine, measured)
    assert fit.cost.slowdown == pytest.approx(serving.slowdown, abs=1e-6)
    assert fit.cost.entry_s == serving.entry_s
    for name in ("step_s", "token_s", "request_s", "prompt_token_s"):
        assert getattr(fit.cost, name) == pytest.approx(getattr(serving, name), abs=1e-9)
    assert max(map(abs, fit.errors)) < 1e-6
    assert f"fitted to {len(LOOPS)} short loads" in str(fit)


def test_errors_are_predicted_over_measured() -> None:
    """Twice the engine's time in one of two equal loads: one law cannot be right for both."""
    seconds = duration_s(ServingCost(), LOOPS[0])
    measured = [
        MeasuredLoop(loop=LOOPS[0], duration_s=seconds),
        MeasuredLoop(loop=LOOPS[0], duration_s=2 * seconds),
    ]
    errors = fit_serving_cost(SIMULATED, ENGINE, measured).errors
    # Relative squares are least where the prediction is 6/5 of the shorter duration.
    assert errors == pytest.approx((0.2, -0.4))


def test_steps_are_counted() -> None:
    steps = ServedSteps(CostModel(base_s=1.0), ServingCost(slowdown=0.5, request_s=10.0))
    # Two prompts of 40 in steps of 64 tokens: the second's rest enters no new request.
    loop = ClosedLoop(max_concurrency=2, num_requests=2, input_len=40, output_len=2)
    requests = loop.requests
    engine = replace(SIMULATED, cost=steps)
    simulation = simulate(requests, requests.size(16), engine, max_concurrency=2)
    engine_s, num_steps, num_tokens, num_requests, num_read = steps.counts
    assert (num_tokens, num_requests, num_read) == (4, 2, 2 * 39)
    assert engine_s == num_steps == simulation.stats.num_steps
    assert simulation.duration_s == pytest.approx(1.5 * num_steps + 20.0)


def test_step_of_several_rounds_pays_for_each_token() -> None:
    serving = ServingCost(step_s=1e-5, token_s=1e-6)
    steps = ServedSteps(CostModel(base_s=1e-4, step_s=1e-4), serving)
    loop = ClosedLoop(max_concurrency=2, num_requests=6, input_len=16, output_len=24)
    requests = loop.requests
    engine = replace(SIMULATED, cost=steps)
    simulation = simulate(requests, requests.size(16), engine, max_concurrency=2)
    engine_s, num_steps, num_tokens, num_requests, num_read = steps.counts
    assert (num_tokens, num_requests, num_read) == (6 * 24, 6, 6 * 15)
    assert num_steps < 3 * 24 // 4  # two at a time take 24 rounds for each pair of answers
    assert engine_s == pytest.approx(1e-4 * (num_steps + 3 * 24))
    assert simulation.duration_s == pytest.approx(engine_s + 1e-5 * num_steps + 1e-6 * num_tokens)
