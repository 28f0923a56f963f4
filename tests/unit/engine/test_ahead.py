"""Decodes that are submitted before the last step's result is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmserve.engine.engine import Engine
from llmserve.engine.replay import replay
from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.engine.step_log import StepLog
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Batch, StepResult
from support.engine_life import OverlappingRunner
from support.engines import expected, make_engine, make_info, make_request, run, tokens_by_choice

PROMPTS = {"a": [3, 5, 9], "b": [4] * 11, "c": [7]}


class Recorder(OverlappingRunner):
    """Notes which steps were chosen ahead."""

    def __init__(self, **changes: object) -> None:
        super().__init__(make_info(feeds_tokens=True, **changes))
        self.were_ahead: list[bool] = []

    def submit(self, batch: Batch) -> None:
        self.were_ahead.append(batch.fed_rows is not None)
        super().submit(batch)


def make(runner: OverlappingRunner, **changes: object) -> Engine:
    return make_engine(runner, **changes)


def test_decodes_run_ahead_and_give_the_same_tokens() -> None:
    runner = Recorder()
    engine = make(runner)
    for name, prompt in PROMPTS.items():
        engine.add_request(make_request(name, prompt, max_tokens=10))
    tokens = tokens_by_choice(run(engine))
    for name, prompt in PROMPTS.items():
        assert tokens[name, 0] == expected(prompt, 10)
    # One prefill, one decode whose tokens the host feeds; nobody decodes beyond the length.
    assert runner.were_ahead == [False, False] + [True] * 8


def test_a_runner_that_feeds_no_tokens_is_never_ahead() -> None:
    runner = OverlappingRunner(make_info())
    engine = make(runner)
    engine.add_request(make_request("a", PROMPTS["a"]))
    assert tokens_by_choice(run(engine))["a", 0] == expected(PROMPTS["a"], 8)


def test_who_stops_by_a_token_is_computed_once_in_vain() -> None:
    tokens = expected(PROMPTS["a"], 20)
    stop = next(tokens[n] for n in range(4, 20) if tokens[n] not in tokens[:n])
    runner = Recorder(eos_token_ids=(stop,))
    engine = make(runner)
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=20))
    outputs = run(engine)
    ended = tokens.index(stop)
    assert tokens_by_choice(outputs)["a", 0] == tokens[: ended + 1]
    assert [out.finish_reason for out in outputs if out.finish_reason] == [FinishReason.STOP]
    assert len(runner.were_ahead) == ended + 2
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_a_newcomer_is_admitted_as_soon_as_without() -> None:
    def steps_until_first_token(feeds_tokens: bool) -> int:
        engine = make(OverlappingRunner(make_info(feeds_tokens=feeds_tokens)))
        engine.add_request(make_request("a", PROMPTS["a"], max_tokens=40))
        for now in range(7):
            engine.step(float(now))
        engine.add_request(make_request("b", PROMPTS["b"], max_tokens=4))
        count = 0
        while not any(out.request_id == "b" for out in engine.step(10.0 + count)):
            count += 1
        return count

    assert steps_until_first_token(True) == steps_until_first_token(False)


def test_who_could_not_be_let_in_holds_nobody_up() -> None:
    runner = Recorder()
    engine = make(runner, max_num_seqs=2)
    for index in range(4):
        engine.add_request(make_request(str(index), [index] * 5, max_tokens=10))
    tokens = tokens_by_choice(run(engine))
    for index in range(4):
        assert tokens[str(index), 0] == expected([index] * 5, 10)
    # Who waits is let in by the step after the one that ends the others, as without.
    assert runner.were_ahead == ([False, False] + [True] * 8) * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1.0},
        {"repetition_penalty": 1.1},
    ],
)
def test_a_penalty_is_waited_for(changes: dict[str, float]) -> None:
    runner = Recorder()
    engine = make(runner)
    engine.add_request(make_request("a", PROMPTS["a"], **changes))
    engine.add_request(make_request("b", PROMPTS["b"], max_tokens=20))
    run(engine)
    # As soon as it has ended, the other one goes ahead.
    assert runner.were_ahead.index(True) > 8
    assert any(runner.were_ahead)


def test_a_pool_that_is_short_preempts_as_without() -> None:
    runner = Recorder()
    engine = make(runner, num_blocks=32, max_num_seqs=8)
    for index in range(8):
        engine.add_request(make_request(str(index), [index] * 5, max_tokens=40))
    tokens = tokens_by_choice(run(engine))
    assert engine.stats().num_preemptions > 0
    assert any(runner.were_ahead)
    for index in range(8):
        assert tokens[str(index), 0] == expected([index] * 5, 40)


def test_blocks_that_fill_ahead_are_found_by_others() -> None:
    engine = make(Recorder())
    engine.add_request(make_request("a", PROMPTS["b"], max_tokens=21))
    (tokens,) = tokens_by_choice(run(engine)).values()
    known = [*PROMPTS["b"], *tokens]
    engine.add_request(make_request("b", known, max_tokens=1))
    outputs = run(engine)
    # All but the last token were computed: seven blocks of four, and none is half known.
    assert outputs[-1].num_cached_tokens == (len(known) - 1) // 4 * 4 == 28


def test_aborted_and_finished_ones_leave_the_step_under_way() -> None:
    engine = make(Recorder())
    for name, prompt in PROMPTS.items():
        engine.add_request(make_request(name, prompt, max_tokens=30))
    outputs: list[RequestOutput] = []
    for now in range(8):
        outputs += engine.step(float(now))
        engine.check()
    engine.abort("a")
    engine.finish("b", 0)
    outputs += run(engine)
    tokens = tokens_by_choice(outputs)
    assert tokens["c", 0] == expected(PROMPTS["c"], 30)
    for name in ("a", "b"):
        assert tokens[name, 0] == expected(PROMPTS[name], len(tokens[name, 0]))
    reasons = {out.request_id: out.finish_reason for out in outputs if out.finish_reason}
    assert reasons == {"a": FinishReason.ABORT, "c": FinishReason.LENGTH}


def test_min_tokens_counts_tokens_that_are_not_known_yet() -> None:
    """Ends are banned by the place of the token to be drawn, which the batch tells."""
    seen: list[int] = []

    class Places(Recorder):
        def submit(self, batch: Batch) -> None:
            seen.extend((batch.positions[batch.logits_indices] + 1).tolist())
            super().submit(batch)

    engine = make(Places())
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=9))
    run(engine)
    assert seen == list(range(3, 12))


class Failing(Recorder):
    """Fails when it collects a given step."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.num_collected, self._place = 0, place

    def collect(self) -> StepResult:
        self.num_collected += 1
        if self.num_collected == self._place:
            self.batches.clear()  # after an exception none is under way
            raise RuntimeError("the device failed")
        return super().collect()


def test_a_failure_ends_what_is_under_way_once_and_nothing_is_trusted() -> None:
    engine = make(Failing(6), max_num_seqs=2)
    for name, prompt in PROMPTS.items():
        engine.add_request(make_request(name, prompt, max_tokens=12))
    outputs: list[RequestOutput] = []
    while engine.stats().num_steps < 6:
        outputs += engine.step(0.0)
    with pytest.raises(RuntimeError, match="the device failed"):
        engine.step(1.0)
    engine.fail_running("the device failed")
    engine.check()
    outputs += run(engine)
    reasons = [(out.request_id, out.finish_reason) for out in outputs if out.finish_reason]
    assert sorted(reasons) == [
        ("a", FinishReason.ERROR), ("b", FinishReason.ERROR), ("c", FinishReason.LENGTH),
    ]  # fmt: skip
    assert tokens_by_choice(outputs)["c", 0] == expected(PROMPTS["c"], 12)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_row_that_is_not_finite_ends_although_it_went_on() -> None:
    class Broken(Recorder):
        def collect(self) -> StepResult:
            result = super().collect()
            if len(self.were_ahead) > 5:
                result.is_finite = np.zeros(len(result.token_ids), dtype=np.bool_)
            return result

    engine = make(Broken())
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=20))
    outputs = run(engine)
    assert [out.finish_reason for out in outputs if out.finish_reason] == [FinishReason.ERROR]


def test_a_recorded_run_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    with path.open("w", encoding="utf-8") as file:
        engine = make_engine(Recorder(), watcher=StepLog(file))
        for name, prompt in PROMPTS.items():
            engine.add_request(make_request(name, prompt, max_tokens=10))
        run(engine)
    alone = replay(path)
    computed = replay(path, FakeRunner(make_info()))
    for report in (alone, computed):
        assert report.difference is None
        assert report.num_tokens == 30
