"""Blocks shared between requests: what is found, what is kept apart, and who may write."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.engine.engine import Engine
from llmserve.engine.request import FinishReason, Pooling, RequestOutput
from llmserve.errors import EngineError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Batch, StepResult
from support.engines import expected, make_engine, make_info, make_request, run, tokens_by_choice

PROMPT = list(range(22))  # five full blocks of 4 and half a one


def ask(engine: Engine, name: str, prompt: list[int], **changes: object) -> list[RequestOutput]:
    engine.add_request(make_request(name, prompt, **changes))
    return [output for output in run(engine) if output.request_id == name]


def hit(outputs: list[RequestOutput]) -> int:
    return outputs[0].num_cached_tokens


def test_same_prompt_again_needs_its_last_token_alone() -> None:
    engine = make_engine()
    first = ask(engine, "a", PROMPT)
    before = engine.stats()
    second = ask(engine, "b", PROMPT)
    assert (hit(first), hit(second)) == (0, 21)
    assert tokens_by_choice(first)["a", 0] == tokens_by_choice(second)["b", 0]
    assert engine.stats().num_prefill_tokens == before.num_prefill_tokens


@pytest.mark.parametrize("length", [20, 21, 22, 23, 24])
def test_hit_ends_where_the_prompts_part(length: int) -> None:
    engine = make_engine()
    ask(engine, "a", PROMPT)
    prompt = [*PROMPT[: length - 2], 90, 91]
    outputs = ask(engine, "b", prompt)
    assert hit(outputs) == (length - 2) // 4 * 4
    assert tokens_by_choice(outputs)["b", 0] == expected(prompt, 8)


def test_answer_is_found_by_the_conversations_next_turn() -> None:
    engine = make_engine()
    answer = tokens_by_choice(ask(engine, "a", PROMPT, max_tokens=30))["a", 0]
    outputs = ask(engine, "b", [*PROMPT, *answer, 5, 6])
    assert hit(outputs) == (22 + 29) // 4 * 4
    assert tokens_by_choice(outputs)["b", 0] == expected([*PROMPT, *answer, 5, 6], 8)


def test_equal_prompts_of_one_moment_are_computed_once() -> None:
    engine = make_engine(max_batched_tokens=64)
    for name in "abc":
        engine.add_request(make_request(name, PROMPT))
    outputs = run(engine)
    assert engine.stats().num_prefill_tokens == len(PROMPT)
    assert {output.request_id: output.num_cached_tokens for output in outputs} == {
        "a": 0,
        "b": 21,
        "c": 21,
    }
    assert all(ids == expected(PROMPT, 8) for ids in tokens_by_choice(outputs).values())


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_choices_share_the_prompts_blocks_and_copy_what_they_write(has_prefix_cache: bool) -> None:
    engine = make_engine(max_batched_tokens=64, has_prefix_cache=has_prefix_cache)
    engine.add_request(make_request("a", PROMPT, n=4, temperature=1.0, max_tokens=3))
    engine.step(0.0)
    engine.step(1.0)
    engine.check()
    stats = engine.stats()
    # Five blocks for all of them, and a sixth for each one's own end.
    assert stats.num_blocks - stats.num_free_blocks == 5 + 4
    tokens = tokens_by_choice(run(engine))
    alone = make_engine(has_prefix_cache=False)
    for choice in range(4):
        request = make_request(f"c{choice}", PROMPT, n=4, temperature=1.0, max_tokens=3)
        alone.add_request(request)
        whole = tokens_by_choice(run(alone))[f"c{choice}", choice]
        rest = tokens["a", choice]
        assert whole[-len(rest) :] == rest


def test_without_a_prefix_cache_other_requests_share_nothing() -> None:
    engine = make_engine(has_prefix_cache=False)
    ask(engine, "a", PROMPT, n=2)
    assert hit(ask(engine, "b", PROMPT)) == 0
    assert engine.stats().num_prefix_queries == 0


@pytest.mark.parametrize("change", [{"cache_salt": "other"}, {"adapter": "lora"}])
def test_salts_and_adapters_are_kept_apart(change: dict[str, object]) -> None:
    """reliability R25: nothing is found across, something is found within."""
    engine = make_engine(FakeRunner(make_info(adapters=("lora",))))
    ask(engine, "a", PROMPT)
    assert hit(ask(engine, "b", PROMPT, **change)) == 0
    assert hit(ask(engine, "c", PROMPT, **change)) == 21
    assert hit(ask(engine, "d", PROMPT)) == 21


@pytest.mark.parametrize(
    "change", [{"prompt_logprobs": 0}, {"pooling": Pooling.MEAN}], ids=["logprobs", "vector"]
)
def test_whole_computations_take_no_hit_and_leave_one(change: dict[str, object]) -> None:
    engine = make_engine()
    assert hit(ask(engine, "a", PROMPT, **change)) == 0
    assert hit(ask(engine, "b", PROMPT, **change)) == 0
    assert hit(ask(engine, "c", PROMPT)) == 21


def test_least_recently_used_prompts_give_way() -> None:
    engine = make_engine(num_blocks=32)
    prompts = [[(31 * i + j) % 97 for j in range(22)] for i in range(8)]
    for index, prompt in enumerate(prompts):
        ask(engine, f"r{index}", prompt, max_tokens=1)
    assert hit(ask(engine, "late", prompts[-1], max_tokens=1)) == 21
    assert hit(ask(engine, "early", prompts[0], max_tokens=1)) == 0


def test_preempted_sequence_takes_up_what_is_left_of_its_blocks() -> None:
    counts = []
    for has_prefix_cache in (True, False):
        engine = make_engine(num_blocks=33, has_prefix_cache=has_prefix_cache)
        for index in range(6):
            engine.add_request(make_request(f"r{index}", [index] * 12, max_tokens=24))
        tokens = tokens_by_choice(run(engine))
        assert all(tokens[f"r{i}", 0] == expected([i] * 12, 24) for i in range(6))
        stats = engine.stats()
        assert stats.num_preemptions > 0
        counts.append(stats.num_prefill_tokens)
    assert counts[0] < counts[1]


def test_row_that_is_not_finite_leaves_no_block_behind() -> None:
    """reliability R15: what a poisoned sequence computed is never found."""

    class Poisoned(FakeRunner):
        is_poisoned = True

        def collect(self) -> StepResult:
            result = super().collect()
            result.is_finite = np.full(len(result.token_ids), not self.is_poisoned)
            return result

    runner = Poisoned(make_info())
    engine = make_engine(runner)
    assert ask(engine, "a", PROMPT)[-1].finish_reason is FinishReason.ERROR
    runner.is_poisoned = False
    outputs = ask(engine, "b", PROMPT)
    assert hit(outputs) == 0
    assert tokens_by_choice(outputs)["b", 0] == expected(PROMPT, 8)


def test_step_that_raised_leaves_no_block_behind() -> None:
    class FailsOnce(FakeRunner):
        has_failed = False

        def submit(self, batch: Batch) -> None:
            if not self.has_failed:
                self.has_failed = True
                raise EngineError("broken kernel")
            super().submit(batch)

    engine = make_engine(FailsOnce(make_info()))
    engine.add_request(make_request("a", PROMPT))
    with pytest.raises(EngineError):
        engine.step(0.0)
    engine.fail_running("broken kernel")
    engine.check()
    outputs = ask(engine, "b", PROMPT)
    assert hit(outputs) == 0
    assert tokens_by_choice(outputs)["b", 0] == expected(PROMPT, 8)


def test_hit_on_a_whole_prompt_fits_a_pool_of_one_sequence() -> None:
    engine = make_engine(num_blocks=32)
    prompt = [j % 97 for j in range(127)]
    for name in "ab":
        outputs = ask(engine, name, prompt, max_tokens=1)
        assert tokens_by_choice(outputs)[name, 0] == expected(prompt, 1)


def test_use_is_counted_in_tokens_and_blocks_of_first_admissions() -> None:
    engine = make_engine()
    ask(engine, "a", PROMPT)
    ask(engine, "b", PROMPT)
    ask(engine, "c", [*PROMPT[:8], 90, 91, 92, 93, 94])
    stats = engine.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (22 + 22 + 13, 0 + 21 + 8)
    assert (stats.num_prefix_block_queries, stats.num_prefix_block_hits) == (6 + 6 + 4, 0 + 6 + 2)


def test_choices_of_one_request_are_one_lookup() -> None:
    engine = make_engine()
    ask(engine, "a", PROMPT, n=4)
    stats = engine.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (len(PROMPT), 0)


def test_poisoned_block_is_not_found_again_by_those_who_only_found_it() -> None:
    """The one who computed it may be gone before anybody sees that its numbers are unusable."""

    class Poisoned(FakeRunner):
        is_poisoned = True

        def collect(self) -> StepResult:
            result = super().collect()
            result.is_finite = np.full(len(result.token_ids), not self.is_poisoned)
            return result

    runner = Poisoned(make_info())
    engine = make_engine(runner, max_batched_tokens=16)
    engine.add_request(make_request("gone", PROMPT))
    engine.step(0.0)  # a chunk, without logits that could tell
    engine.abort("gone")
    victim = ask(engine, "victim", PROMPT)
    assert (hit(victim), victim[-1].finish_reason) == (16, FinishReason.ERROR)
    runner.is_poisoned = False
    assert hit(ask(engine, "later", PROMPT)) == 0


def test_resumed_request_reports_the_hit_it_reported_first() -> None:
    engine = make_engine()
    made = expected(PROMPT, 3)
    outputs = ask(engine, "a", PROMPT, output_token_ids=[made], num_cached_tokens=8)
    assert {output.num_cached_tokens for output in outputs} == {8}
    assert tokens_by_choice(outputs)["a", 0] == expected(PROMPT, 8)[3:]
