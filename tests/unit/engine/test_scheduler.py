"""What a step is made of: budget, order, admission, preemption."""

from __future__ import annotations

from llmserve.engine.config import EngineConfig
from llmserve.engine.scheduler import ScheduledSequence, Scheduler
from llmserve.engine.sequence import Sequence
from support.engines import make_request


def make_scheduler(**changes: int) -> Scheduler:
    values = {"num_blocks": 16, "block_size": 4, "max_seq_len": 64, "max_batched_tokens": 8}
    return Scheduler(EngineConfig(**{**values, "max_num_seqs": 4, **changes}))


def make_sequence(order: int, num_tokens: int, *, priority: int = 0) -> Sequence:
    request = make_request(f"r{order}", list(range(num_tokens)), priority=priority)
    return Sequence(
        request=request,
        choice_index=0,
        order=order,
        token_ids=list(request.prompt_token_ids),
        max_len=64,
        stop_token_ids=frozenset(),
    )


def complete(scheduled: list[ScheduledSequence]) -> None:
    """Do what the engine does after a step: count the tokens, draw the next ones."""
    for item in scheduled:
        draws = item.needs_logits
        item.sequence.num_computed_tokens += item.num_tokens
        if draws:
            item.sequence.token_ids.append(0)


def shares(scheduled: list[ScheduledSequence]) -> dict[str, int]:
    return {item.sequence.request.request_id: item.num_tokens for item in scheduled}


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, 19))
    sizes = []
    for _ in range(3):
        scheduled = scheduler.schedule(0.0)
        sizes.append(shares(scheduled)["r1"])
        complete(scheduled)
        scheduler.check()
    assert sizes == [8, 8, 3]


def test_decodes_come_before_prefill_and_are_never_left_out() -> None:
    scheduler = make_scheduler()
    for order in (1, 2):
        scheduler.add(make_sequence(order, 3))
    complete(scheduler.schedule(0.0))
    scheduler.add(make_sequence(3, 40))
    for _ in range(3):
        scheduled = scheduler.schedule(0.0)
        assert shares(scheduled) == {"r1": 1, "r2": 1, "r3": 6}
        complete(scheduled)


def test_lower_priority_number_is_admitted_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence(1, 3, priority=5))
    scheduler.add(make_sequence(2, 3, priority=-1))
    assert list(shares(scheduler.schedule(0.0))) == ["r2"]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler()
    for order in range(6):
        scheduler.add(make_sequence(order, 1))
    assert len(scheduler.schedule(0.0)) == 4
    assert len(scheduler.waiting) == 2


def test_newest_is_preempted_when_blocks_run_out_and_resumes_in_order() -> None:
    # Reserved for growth: admission keeps one block for each running sequence.
    scheduler = make_scheduler(num_blocks=5, max_seq_len=20)
    first, second = make_sequence(1, 7), make_sequence(2, 7)
    scheduler.add(first)
    complete(scheduler.schedule(0.0))
    scheduler.add(second)
    preempted_at = None
    for step in range(12):
        complete(scheduler.schedule(0.0))
        scheduler.check()
        if second in scheduler.waiting:
            preempted_at = step
            break
    assert preempted_at is not None
    assert scheduler.num_preemptions == 1
    assert second.num_computed_tokens == 0
    assert second.block_table == []
    assert first in scheduler.running
    scheduler.remove(first)
    scheduled = scheduler.schedule(0.0)
    assert [item.sequence for item in scheduled] == [second]


def test_admission_waits_for_the_oldest_and_lets_nobody_overtake() -> None:
    scheduler = make_scheduler(num_blocks=4, max_seq_len=16)
    for order, size in ((1, 8), (2, 16), (3, 1)):
        scheduler.add(make_sequence(order, size))
    assert list(shares(scheduler.schedule(0.0))) == ["r1"]
    assert [sequence.order for sequence in scheduler.waiting] == [2, 3]


def test_blocks_wasted_stay_under_one_per_sequence() -> None:
    scheduler = make_scheduler(num_blocks=64, max_batched_tokens=64)
    for order in range(4):
        scheduler.add(make_sequence(order, 5 + order))
    for _ in range(10):
        complete(scheduler.schedule(0.0))
        for sequence in scheduler.running:
            assert len(sequence.block_table) * 4 - sequence.num_computed_tokens < 4
