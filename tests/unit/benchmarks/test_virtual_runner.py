"""A runner that only lets time pass, under the real engine."""

from __future__ import annotations

import pytest

from llmserve.benchmarks.cost_model import parse_cost_model
from llmserve.benchmarks.virtual_runner import VirtualClock, VirtualRunner
from llmserve.engine.engine import Engine
from llmserve.errors import EngineError
from support.engines import make_config, make_request, run, tokens_by_choice

COST = "base_ms=100,token_us=3,seq_us=5,context_ns=700,pair_ns=11,step_ms=40"


def test_time_passes_by_the_cost_of_each_step() -> None:
    clock = VirtualClock()
    runner = VirtualRunner(parse_cost_model("base_ms=1000,token_us=1"), clock, max_seq_len=128)
    engine = Engine(runner, make_config(max_batched_tokens=16))
    engine.add_request(make_request("a", [5] * 20, max_tokens=3))
    outputs = run(engine)
    # 16 and 4 tokens of the prompt, then two decodes: the third token is drawn and not computed.
    assert clock.now_s == pytest.approx(4 + 22e-6)
    assert runner.busy_s == clock.now_s
    assert tokens_by_choice(outputs)["a", 0] == [5, 5, 5]


def played(cost: str, *, most_rounds_s: float) -> tuple[Engine, VirtualClock, dict]:
    """Three answers by an engine that is told the virtual time; their tokens."""
    clock = VirtualClock()
    runner = VirtualRunner(parse_cost_model(cost), clock, max_seq_len=128)
    engine = Engine(runner, make_config(most_rounds_s=most_rounds_s))
    for index, max_tokens in enumerate((9, 30, 47)):
        engine.add_request(make_request(str(index), [index] * 7, max_tokens=max_tokens))
    outputs = []
    while engine.has_work:
        outputs += engine.step(clock.now_s)
        engine.check()
    assert runner.busy_s == clock.now_s
    return engine, clock, tokens_by_choice(outputs)


@pytest.mark.parametrize("most_rounds_s", [0.3, 10.0])
def test_rounds_are_the_tokens_and_the_time_of_steps_but_for_what_a_step_costs_once(
    most_rounds_s: float,
) -> None:
    single, single_clock, single_tokens = played(COST, most_rounds_s=0.0)
    several, clock, tokens = played(COST, most_rounds_s=most_rounds_s)
    assert tokens == single_tokens
    assert [len(ids) for ids in tokens.values()] == [9, 30, 47]
    num_saved = single.stats().num_steps - several.stats().num_steps
    assert num_saved > 20
    assert single_clock.now_s - clock.now_s == pytest.approx(num_saved * 40e-3)


def test_runner_may_take_one_round_a_step() -> None:
    runner = VirtualRunner(
        parse_cost_model("base_ms=1"), VirtualClock(), max_seq_len=128, repeats_decodes=False
    )
    engine = Engine(runner, make_config(most_rounds_s=1e3))
    engine.add_request(make_request("a", [5] * 4, max_tokens=12))
    run(engine)
    assert engine.stats().num_steps == 12


def test_most_sequences_are_those_of_one_step() -> None:
    runner = VirtualRunner(parse_cost_model("base_ms=1"), VirtualClock(), max_seq_len=128)
    engine = Engine(runner, make_config())
    for index in range(3):
        engine.add_request(make_request(str(index), [index] * 4))
    run(engine)
    assert runner.most_sequences == 3


def test_result_is_given_out_once() -> None:
    runner = VirtualRunner(parse_cost_model("base_ms=1"), VirtualClock(), max_seq_len=8)
    with pytest.raises(EngineError, match="no step is under way"):
        runner.collect()
