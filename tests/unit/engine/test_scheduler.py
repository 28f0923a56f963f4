"""What a step is made of: budget, order, admission, preemption."""

from __future__ import annotations

import pytest

from llmserve.engine.engine import Engine
from llmserve.engine.step import Step
from llmserve.engine.watcher import Watcher
from support.engines import make_engine, make_request


class Steps(Watcher):
    """Keeps what each step decided: tokens by request, and who was preempted."""

    def __init__(self) -> None:
        self.shares: list[dict[str, int]] = []
        self.preempted: list[list[str]] = []

    def scheduled(self, step: Step) -> None:
        shares = {sequence.request_id: 1 for sequence in step.decodes}
        shares |= {chunk.sequence.request_id: chunk.num_tokens for chunk in step.chunks}
        self.shares.append(shares)
        self.preempted.append([sequence.request_id for sequence in step.preempted])


def make(**changes: object) -> tuple[Engine, Steps]:
    steps = Steps()
    values = {"num_blocks": 16, "max_seq_len": 64, "max_batched_tokens": 8, "max_num_seqs": 4}
    return make_engine(watcher=steps, **{**values, **changes}), steps


def add(engine: Engine, order: int, num_tokens: int, **changes: object) -> None:
    prompt = [(order * 17 + i) % 97 for i in range(num_tokens)]
    engine.add_request(make_request(f"r{order}", prompt, **{"max_tokens": 20, **changes}))


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    engine, steps = make()
    add(engine, 1, 19)
    for _ in range(3):
        engine.step(0.0)
        engine.check()
    assert [shares["r1"] for shares in steps.shares] == [8, 8, 3]


def test_chunks_shrink_towards_the_end_of_the_context() -> None:
    """Weights of 1 at position 0 and 4 at 60, of a budget of 16: what a chunk's start leaves."""
    engine, steps = make(max_batched_tokens=16, block_size=4, far_token_weight=4.0)
    add(engine, 1, 60, max_tokens=4)
    starts, start = [], 0
    while start < 60:
        engine.step(0.0)
        engine.check()
        taken = steps.shares[-1]["r1"]
        assert taken == min(int(16 / (1 + 3 * start / 60)), 60 - start)
        starts.append(start)
        start += taken
    assert len(starts) > 7


def test_prefill_gets_a_block_however_far_it_is() -> None:
    engine, steps = make(max_batched_tokens=4, block_size=4, far_token_weight=50.0)
    add(engine, 1, 60, max_tokens=4)
    for _ in range(15):
        engine.step(0.0)
    assert [shares["r1"] for shares in steps.shares] == [4] * 15


def test_prefill_takes_more_while_nobody_decodes() -> None:
    engine, steps = make(num_blocks=64, max_prefill_tokens=12)
    add(engine, 1, 14)
    add(engine, 2, 30)
    for _ in range(3):
        engine.step(0.0)
        engine.check()
    assert steps.shares == [{"r1": 12}, {"r1": 2, "r2": 10}, {"r1": 1, "r2": 7}]


def test_decodes_come_before_prefill_and_are_never_left_out() -> None:
    """Nobody's next token waits for more than one step, and no step has more than the budget."""
    engine, steps = make(num_blocks=64)
    for order in (1, 2):
        add(engine, order, 3)
    engine.step(0.0)
    add(engine, 3, 40)
    for _ in range(3):
        engine.step(0.0)
    assert steps.shares[1:] == [{"r1": 1, "r2": 1, "r3": 6}] * 3


def test_step_never_exceeds_the_budget() -> None:
    engine, steps = make(num_blocks=64)
    for order in range(6):
        add(engine, order, 5 + 7 * order)
    while engine.has_work:
        engine.step(0.0)
    assert max(sum(shares.values()) for shares in steps.shares) == 8


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_more_decodes_than_the_budget_all_go_on_and_prefill_gets_as_many(weight: float) -> None:
    engine, steps = make(
        num_blocks=64, block_size=2, max_batched_tokens=4, max_num_seqs=8, far_token_weight=weight
    )
    for order in range(7):
        add(engine, order, 1)
    while len(steps.shares) < 7:
        engine.step(0.0)
    decodes = {f"r{order}": 1 for order in range(7)}
    add(engine, 8, 30)
    engine.step(0.0)
    engine.step(0.0)
    second = int(8 / (1 + (weight - 1) * 8 / (64 - 4 / weight)))
    assert steps.shares[-2:] == [decodes | {"r8": 8}, decodes | {"r8": second}]


def test_who_waits_makes_prefill_larger_up_to_a_full_batch() -> None:
    """Four run or wait at first, of which 3 tokens of budget would never make a batch."""
    engine, steps = make(num_blocks=64, block_size=2, max_batched_tokens=3, max_num_seqs=5)
    for order in range(4):
        add(engine, order, 9)
    engine.step(0.0)
    for order in range(4, 9):
        add(engine, order, 9)
    engine.step(0.0)
    assert steps.shares == [{"r0": 4}, {"r0": 5}]


def test_few_decodes_leave_prefill_a_block() -> None:
    engine, steps = make(num_blocks=64, block_size=4, max_batched_tokens=3, max_num_seqs=9)
    for order in range(3):
        add(engine, order, 1)
    while len(steps.shares) < 3:
        engine.step(0.0)
    add(engine, 8, 30)
    engine.step(0.0)
    assert steps.shares[-1] == {f"r{order}": 1 for order in range(3)} | {"r8": 4}


def test_lower_priority_number_is_admitted_first() -> None:
    engine, steps = make(max_num_seqs=1, policy="priority")
    add(engine, 1, 3, priority=5)
    add(engine, 2, 3, priority=-1)
    engine.step(0.0)
    assert list(steps.shares[0]) == ["r2"]


def test_no_more_than_max_num_seqs_run() -> None:
    engine, steps = make()
    for order in range(6):
        add(engine, order, 1)
    engine.step(0.0)
    assert len(steps.shares[0]) == 4
    assert (engine.stats().num_running, engine.stats().num_waiting) == (4, 2)


def test_newest_is_preempted_when_blocks_run_out_and_resumes_in_order() -> None:
    engine, steps = make(num_blocks=16, max_seq_len=64)
    for order in (1, 2, 3):
        add(engine, order, 7, max_tokens=40)
    while engine.has_work:
        engine.step(0.0)
        engine.check()
    preempted = [name for names in steps.preempted for name in names]
    assert preempted
    assert preempted[0] == "r3"
    assert "r1" not in preempted
    first = {
        name: next(i for i, names in enumerate(steps.preempted) if name in names)
        for name in preempted
    }
    back = {
        name: next(i for i, shares in enumerate(steps.shares) if i > first[name] and name in shares)
        for name in first
    }
    assert all(back[name] > first[name] for name in first)


def test_oldest_waiting_lets_nobody_overtake() -> None:
    engine, steps = make(num_blocks=16, max_batched_tokens=64)
    for order, size in ((1, 40), (2, 36), (3, 1)):
        add(engine, order, size, max_tokens=4)
    engine.step(0.0)
    assert list(steps.shares[0]) == ["r1"]
    assert engine.stats().num_waiting == 2


def test_waiting_tokens_are_counted() -> None:
    engine, _ = make(max_num_seqs=1)
    add(engine, 1, 3)
    add(engine, 2, 5)
    assert engine.stats().num_waiting_tokens == 8
    engine.step(0.0)
    assert engine.stats().num_waiting_tokens == 5
    engine.abort("r2")
    assert engine.stats().num_waiting_tokens == 0
