"""A runner that only lets time pass, under the real engine."""

from __future__ import annotations

import pytest

from llmserve.benchmarks.cost_model import parse_cost_model
from llmserve.benchmarks.virtual_runner import VirtualClock, VirtualRunner
from llmserve.engine.engine import Engine
from llmserve.errors import EngineError
from support.engines import make_config, make_request, run, tokens_by_choice


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
