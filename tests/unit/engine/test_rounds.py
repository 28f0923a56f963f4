"""Steps that draw several tokens for each sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmserve.engine.engine import Engine
from llmserve.engine.policy_fair import FairPolicy
from llmserve.engine.replay import replay
from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.engine.rounds import RoundClock
from llmserve.engine.step import Step
from llmserve.engine.step_log import StepLog
from llmserve.errors import EngineError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Batch, StepResult
from support.engines import (
    expected,
    make_config,
    make_engine,
    make_info,
    make_request,
    run,
    tokens_by_choice,
)

PROMPTS = {"a": [3, 5, 9], "b": [4] * 11, "c": [7]}
FOUR = 4.5
"""Seconds for four rounds, where a step takes one."""


class Recorder(FakeRunner):
    """Notes how many rounds each step was asked for, and how many it drew."""

    def __init__(self, **changes: object) -> None:
        super().__init__(make_info(repeats_decodes=True, **changes))
        self.rounds: list[int] = []
        self.drawn: list[int] = []
        self.last_positions: list[int] = []

    def submit(self, batch: Batch) -> None:
        self.rounds.append(batch.num_rounds)
        for row in batch.sampling:
            made = len(row.token_ids) - row.num_prompt_tokens
            assert made + batch.num_rounds <= row.params.max_tokens, "beyond its length"
        self.last_positions.append(int(batch.positions.max()) + batch.num_rounds - 1)
        super().submit(batch)

    def collect(self) -> StepResult:
        result = super().collect()
        self.drawn.append(len(result.token_ids))
        return result


def make(runner: FakeRunner, **changes: object) -> Engine:
    return make_engine(runner, **{"most_rounds_s": FOUR, **changes})


def run_evenly(engine: Engine) -> list[RequestOutput]:
    """Step to the end, a second for each round of the step before."""
    outputs: list[RequestOutput] = []
    now = 0.0
    while engine.has_work:
        outputs += engine.step(now)
        engine.check()
        runner = engine._runner
        assert isinstance(runner, Recorder)
        now += float(runner.rounds[-1])
    return outputs


def test_several_tokens_a_step_are_the_same_tokens() -> None:
    runner = Recorder()
    engine = make(runner)
    for name, prompt in PROMPTS.items():
        engine.add_request(make_request(name, prompt, max_tokens=19))
    outputs = run_evenly(engine)
    tokens = tokens_by_choice(outputs)
    for name, prompt in PROMPTS.items():
        assert tokens[name, 0] == expected(prompt, 19)
    # A prefill; a decode, which tells how long a round takes; then four rounds, and what is left.
    assert runner.rounds == [1, 1, 4, 4, 4, 4, 1]
    assert max(runner.last_positions) == 11 + 19 - 2  # the last token is drawn, not computed
    assert engine.stats().num_decode_tokens == 3 * 18 + 1  # and a prompt of one token
    assert {len(out.token_ids) for out in outputs} == {1, 4}


def test_a_runner_that_cannot_is_not_asked_and_zero_seconds_are_one_round() -> None:
    for repeats, most_s in ((False, FOUR), (True, 0.0)):
        runner = Recorder()
        runner.info = make_info(repeats_decodes=repeats)
        engine = make(runner, most_rounds_s=most_s)
        engine.add_request(make_request("a", PROMPTS["a"]))
        assert tokens_by_choice(run(engine))["a", 0] == expected(PROMPTS["a"], 8)
        assert set(runner.rounds) == {1}


def decodes(count: int, num_rounds: int) -> Step:
    engine = make_engine()
    engine.add_request(make_request("a", [1], n=count))
    sequences = engine._live["a"]
    return Step(decodes=sequences, num_rounds=num_rounds)


def test_rounds_are_as_many_as_the_last_step_of_so_many_tells() -> None:
    clock = RoundClock(make_config(most_rounds_s=0.1, block_size=8))
    clock.tick(5.0)
    assert clock.most(2) == 1, "nothing is known yet"
    clock.note(decodes(2, 1))
    clock.tick(5.03)
    assert clock.most(2) == clock.most(1) == 3
    assert clock.most(3) == 1, "more may take longer"
    clock.note(decodes(2, 3))
    clock.tick(5.15)
    assert clock.most(2) == 2, "a round took 0.04 s"
    clock.note(Step())
    clock.tick(9.0)
    assert clock.most(2) == 2, "a step without decodes, or with prompts, tells nothing"
    clock.note(decodes(1, 2))
    clock.tick(9.002)
    assert clock.most(1) == 8, "a block's tokens at most"
    clock.note(decodes(1, 8))
    clock.tick(19.0)
    assert clock.most(1) == 1, "a round at least, however long it takes"
    clock.note(decodes(1, 1))
    clock.tick(19.0)
    assert clock.most(1) == 8, "no time at all"


def test_an_end_in_the_middle_is_the_end_and_the_rest_is_not_drawn() -> None:
    tokens = expected(PROMPTS["a"], 20)
    ended = next(n for n in range(3, 20) if tokens[n] not in tokens[:n] and n % 4 == 3)
    runner = Recorder(eos_token_ids=(tokens[ended],))
    engine = make(runner)
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=40))
    outputs = run_evenly(engine)
    assert tokens_by_choice(outputs)["a", 0] == tokens[: ended + 1]
    last = outputs[-1]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, tokens[ended])
    # Alone, the runner stops where the sequence does.
    assert runner.rounds[-1] == 4
    assert sum(runner.drawn) == ended + 1
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_a_neighbours_end_leaves_the_others_as_they_are() -> None:
    tokens = expected(PROMPTS["a"], 20)
    ended = next(n for n in range(3, 20) if tokens[n] not in tokens[:n])
    stop = tokens[ended]
    runner = Recorder()
    engine = make(runner)
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=40, stop_token_ids=(stop,)))
    engine.add_request(make_request("b", PROMPTS["b"], max_tokens=30))
    found = tokens_by_choice(run_evenly(engine))
    assert found["a", 0] == tokens[: ended + 1]
    assert found["b", 0] == expected(PROMPTS["b"], 30)
    assert sum(runner.drawn) > ended + 1 + 30, "what was computed in vain"


def test_who_waits_for_a_row_stops_nobody_and_who_could_come_in_does() -> None:
    runner = Recorder()
    engine = make(runner, max_num_seqs=2)
    for index in range(4):
        engine.add_request(make_request(str(index), [index] * 5, max_tokens=10))
    tokens = tokens_by_choice(run_evenly(engine))
    for index in range(4):
        assert tokens[str(index), 0] == expected([index] * 5, 10)
    assert runner.rounds == [1, 1, 4, 4, 1, 4, 4, 1]

    engine = make(runner := Recorder(), num_blocks=8, max_seq_len=32, max_num_seqs=4)
    engine.add_request(make_request("a", [1] * 20, max_tokens=9))
    engine.add_request(make_request("b", [2] * 20, max_tokens=9))
    tokens = tokens_by_choice(run_evenly(engine))
    assert tokens["a", 0] == expected([1] * 20, 9)
    assert tokens["b", 0] == expected([2] * 20, 9)
    # There is a row for it, and blocks once the other has ended, whenever that is.
    assert runner.rounds == [1] * 9 + [1, 4, 4]


def test_nobody_goes_beyond_its_length() -> None:
    runner = Recorder()
    engine = make(runner)
    for name, length in (("a", 19), ("b", 10), ("c", 12)):
        engine.add_request(make_request(name, PROMPTS[name], max_tokens=length))
    tokens = tokens_by_choice(run_evenly(engine))
    for name, length in (("a", 19), ("b", 10), ("c", 12)):
        assert tokens[name, 0] == expected(PROMPTS[name], length)
    assert runner.rounds == [1, 1, 4, 4, 2, 4, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"logprobs": 0},
        {"min_tokens": 3},
    ],
)
def test_who_needs_each_token_is_given_one_at_a_time(changes: dict[str, float]) -> None:
    runner = Recorder()
    engine = make(runner)
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=9, **changes))
    engine.add_request(make_request("b", PROMPTS["b"], max_tokens=20))
    assert tokens_by_choice(run_evenly(engine))["b", 0] == expected(PROMPTS["b"], 20)
    # As soon as it has ended, the other one is given several.
    assert runner.rounds.index(4) >= 9


def test_a_pool_that_is_short_gives_one_round_and_preempts_no_more_than_without() -> None:
    preemptions = []
    for most_s in (0.0, FOUR):
        runner = Recorder()
        engine = make(runner, num_blocks=32, max_num_seqs=8, most_rounds_s=most_s)
        for index in range(8):
            engine.add_request(make_request(str(index), [index] * 5, max_tokens=40))
        tokens = tokens_by_choice(run_evenly(engine))
        for index in range(8):
            assert tokens[str(index), 0] == expected([index] * 5, 40)
        preemptions.append(engine.stats().num_preemptions)
    assert 0 < preemptions[1] <= preemptions[0]


def test_blocks_that_fill_in_rounds_are_found_by_others() -> None:
    engine = make(Recorder())
    engine.add_request(make_request("a", PROMPTS["b"], max_tokens=21))
    (tokens,) = tokens_by_choice(run_evenly(engine)).values()
    known = [*PROMPTS["b"], *tokens]
    engine.add_request(make_request("b", known, max_tokens=1))
    outputs = run_evenly(engine)
    # All but the last token were computed: seven blocks of four, and none is half known.
    assert outputs[-1].num_cached_tokens == (len(known) - 1) // 4 * 4 == 28


def test_what_was_computed_behind_an_end_is_nobodys_prefix() -> None:
    tokens = expected(PROMPTS["b"], 20)
    stop = tokens[5]
    assert stop not in tokens[:5]
    engine = make(Recorder())
    engine.add_request(make_request("a", PROMPTS["b"], max_tokens=40, stop_token_ids=(stop,)))
    engine.add_request(make_request("c", PROMPTS["c"], max_tokens=40))
    run_evenly(engine)
    engine.add_request(make_request("b", [*PROMPTS["b"], *tokens], max_tokens=1))
    (found,) = run_evenly(engine)
    assert found.num_cached_tokens == 16  # of 11 + 6 tokens, the last one drawn and not computed


def test_a_token_that_cannot_be_drawn_comes_after_those_that_could() -> None:
    class Broken(Recorder):
        """The third and later tokens of `a` cannot be drawn."""

        def submit(self, batch: Batch) -> None:
            super().submit(batch)
            place = next((n for n, row in enumerate(batch.sampling) if row.seed == 5), None)
            if place is None:
                return
            result = super().collect()
            count = len(batch.sampling)
            position = len(batch.sampling[place].token_ids)
            num_good = max(0, len(PROMPTS["a"]) + 3 - position)
            if num_good < len(result.token_ids) // count:
                result.token_ids = result.token_ids[: (num_good + 1) * count]
                result.is_finite = np.ones(len(result.token_ids), dtype=np.bool_)
                result.is_finite[num_good * count + place] = False
            self._result = result

    engine = make(Broken())
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=20, seed=5))
    engine.add_request(make_request("b", PROMPTS["b"], max_tokens=20))
    outputs = run_evenly(engine)
    tokens = tokens_by_choice(outputs)
    assert tokens["a", 0] == expected(PROMPTS["a"], 3)
    assert tokens["b", 0] == expected(PROMPTS["b"], 20)
    reasons = {out.request_id: out.finish_reason for out in outputs if out.finish_reason}
    assert reasons == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}


def test_a_failure_ends_what_is_under_way_and_nothing_is_trusted() -> None:
    class Failing(Recorder):
        def submit(self, batch: Batch) -> None:
            super().submit(batch)
            if batch.num_rounds > 1:
                raise RuntimeError("the kernels failed")

    engine = make(Failing())
    engine.add_request(make_request("a", PROMPTS["a"], max_tokens=12))
    engine.step(0.0)
    engine.step(1.0)
    with pytest.raises(RuntimeError, match="the kernels failed"):
        engine.step(2.0)
    engine.fail_running("the kernels failed")
    engine.check()
    (output,) = engine.step(3.0)
    assert output.finish_reason is FinishReason.ERROR
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("num_tokens", [0, 3, 10])
def test_rounds_that_nobody_asked_for_are_an_error(num_tokens: int) -> None:
    class Wrong(Recorder):
        def collect(self) -> StepResult:
            result = super().collect()
            if self.rounds[-1] > 1:
                result.token_ids = np.zeros(num_tokens, dtype=np.int64)
            return result

    engine = make(Wrong())
    for name in ("a", "b"):
        engine.add_request(make_request(name, PROMPTS[name], max_tokens=12))
    with pytest.raises(EngineError, match=f"{num_tokens} tokens; from 1 to 4 rounds of 2"):
        run_evenly(engine)


def test_a_tenant_pays_for_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    paid: dict[str, float] = {}

    def charge(policy: FairPolicy, tokens_by_tenant: dict[str, float]) -> None:
        for tenant, tokens in tokens_by_tenant.items():
            paid[tenant] = paid.get(tenant, 0.0) + tokens

    monkeypatch.setattr(FairPolicy, "charge", charge)
    engine = make(runner := Recorder(), policy="fair")
    engine.add_request(make_request("a", [1] * 4, max_tokens=17, tenant="x"))
    engine.add_request(make_request("b", [2] * 6, max_tokens=17, tenant="y"))
    run_evenly(engine)
    assert max(runner.rounds) == 4
    assert paid == {"x": 4 + 2.0 * 16, "y": 6 + 2.0 * 16}


def test_a_recorded_run_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "steps.log"
    with path.open("w", encoding="utf-8") as file:
        engine = make(Recorder(), watcher=StepLog(file))
        for name, prompt in PROMPTS.items():
            engine.add_request(make_request(name, prompt, max_tokens=10))
        run_evenly(engine)
    alone = replay(path)
    computed = replay(path, FakeRunner(make_info(repeats_decodes=True)))
    for report in (alone, computed):
        assert report.difference is None
        assert report.num_tokens == 30
