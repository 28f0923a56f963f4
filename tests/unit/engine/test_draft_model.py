"""Guesses by a smaller model.

The scripted runner's tokens are a digest of what it reads back from its cache: a guess is right if
and only if the draft's cache held the right tokens at the right places.
"""

from __future__ import annotations

import random

import pytest

from llmserve.engine.config import SpeculationConfig
from llmserve.engine.draft_model import DraftModelDrafter
from llmserve.errors import ConfigError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import CacheGroup
from llmserve.sampling import SamplingParams
from support.draft_runner import BLOCK_SIZE, Bench, Live, WatchedRunner, prompt, right
from support.engines import (
    VOCAB,
    make_config,
    make_engine,
    make_info,
    make_request,
    run,
    tokens_by_choice,
)


def draw(live: Live, count: int) -> list[int]:
    """What the scripted runner draws for a sequence, row by row, without any engine."""
    runner = FakeRunner(make_info())
    drafter = DraftModelDrafter(runner, make_info(), make_config(block_size=BLOCK_SIZE))
    ids = list(live.token_ids)
    for index in range(count):
        alone = Live(live.key, ids, list(range(32)), params=live.row.params)
        alone.row.num_prompt_tokens = live.row.num_prompt_tokens
        alone.key = index
        ids += drafter.propose([alone.request(1)])[0]
    return ids[len(live.token_ids) :]


def test_guesses_are_what_the_draft_model_draws() -> None:
    bench = Bench()
    one, other = Live(1, prompt(5), [3, 9, 4]), Live(2, prompt(9, 1), [8, 1, 0, 7])
    assert bench.propose(one, other) == [right(one.token_ids), right(other.token_ids)]
    assert bench.runner.num_tokens == [14, 2, 2]


def test_seeded_guesses_use_the_position_of_the_token_they_stand_for() -> None:
    bench = Bench()
    live = Live(1, prompt(6), [3, 9, 4], params=SamplingParams(temperature=0.8))
    [guesses] = bench.propose(live)
    assert guesses == draw(live, 3)
    assert guesses != right(live.token_ids)


def test_each_request_gets_as_many_guesses_as_it_asked_for() -> None:
    bench = Bench()
    lives = [Live(key, prompt(5, key), [3 * key, 3 * key + 1, 3 * key + 2]) for key in range(3)]
    requests = [live.request(count) for live, count in zip(lives, (1, 3, 2), strict=True)]
    assert [len(guesses) for guesses in bench.drafter.propose(requests)] == [1, 3, 2]
    assert bench.runner.num_tokens == [15, 2, 1]


def test_accepted_guesses_are_not_computed_again() -> None:
    bench = Bench()
    live = Live(1, prompt(6), list(range(10)))
    bench.propose(live)
    live.token_ids += right(live.token_ids, 4)
    assert bench.propose(live) == [right(live.token_ids)]
    # Two of the three guesses were computed; the third and the target's own token are not yet.
    assert bench.runner.num_tokens == [6, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_guesses_stay_right_however_many_are_accepted(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench()
    lives = [
        Live(key, prompt(3 + key, key), list(range(16 * key, 16 * key + 16))) for key in range(3)
    ]
    for _ in range(14):
        asked = [live for live in lives if rng.random() < 0.8]
        for live, guesses in zip(asked, bench.propose(*asked), strict=True):
            assert guesses == right(live.token_ids)
        for live in lives:
            num_accepted = rng.randrange(4)
            live.token_ids += right(live.token_ids, num_accepted)
            live.token_ids.append(rng.randrange(VOCAB))


def test_guess_that_came_true_by_another_way_counts() -> None:
    """The engine used fewer guesses than there were; the target then drew the next one itself."""
    bench = Bench()
    live = Live(1, prompt(6), list(range(10)))
    [guesses] = bench.propose(live)
    live.token_ids += guesses[:1]
    assert bench.propose(live) == [right(live.token_ids)]
    assert bench.runner.num_tokens == [6, 1, 1, 1, 1, 1]


def test_block_that_held_only_guesses_may_come_back_as_another() -> None:
    bench = Bench()
    live = Live(1, prompt(7), [5, 6, 7])
    bench.propose(live)
    live.token_ids.append((right(live.token_ids, 1)[0] + 1) % VOCAB)
    bench.propose(Live(2, prompt(3, 1), [7, 8]))
    live.table = [5, 6, 9]
    assert bench.propose(live) == [right(live.token_ids)]


def test_catching_up_takes_one_chunk_a_call_and_delays_nobody() -> None:
    bench = Bench(max_batched_tokens=16)
    short, long = Live(1, prompt(4, 1), list(range(20, 30))), Live(2, prompt(40), list(range(12)))
    assert bench.propose(short) == [right(short.token_ids)]
    for _ in range(2):
        short.token_ids += right(short.token_ids, 4)
        assert bench.propose(long, short) == [[], right(short.token_ids)]
    short.token_ids += right(short.token_ids, 4)
    assert bench.propose(long, short) == [right(live.token_ids) for live in (long, short)]
    assert max(bench.runner.num_tokens) == 16


def test_more_to_catch_up_than_a_step_holds_waits() -> None:
    bench = Bench(max_batched_tokens=16)
    lives = [Live(key, prompt(7, key), [4 * key, 4 * key + 1, 4 * key + 2]) for key in range(3)]
    assert bench.propose(*lives) == [right(lives[0].token_ids), right(lives[1].token_ids), []]
    assert bench.propose(*lives) == [right(live.token_ids) for live in lives]
    assert bench.runner.num_tokens[0] == 16


def test_logits_that_are_not_finite_end_a_sequences_guesses_until_it_is_forgotten() -> None:
    bad = prompt(8)
    bench = Bench(is_bad=lambda token_ids: token_ids[:9] == [*bad, 1])
    live, good = Live(1, [*bad, 1], [5, 6, 7, 8]), Live(2, prompt(5, 1), [1, 2, 3])
    for _ in range(2):
        assert bench.propose(live, good) == [[], right(good.token_ids)]
        live.token_ids.append(3)
    assert sum(bench.runner.num_tokens[3:]) == 3, "the broken sequence is computed no more"
    bench.drafter.forget(1)
    live = Live(1, [*bad, 2], [5, 6, 7, 8])
    assert bench.propose(live) == [right(live.token_ids)]


def test_guess_without_finite_logits_after_it_is_the_last() -> None:
    live = Live(1, prompt(6), list(range(10)))
    guesses = right(live.token_ids)
    bad = live.token_ids + guesses[:2]
    bench = Bench(is_bad=lambda token_ids: token_ids == bad)
    assert bench.propose(live) == [guesses[:2]]
    live.token_ids += [*guesses[:1], (guesses[1] + 1) % VOCAB]
    assert bench.propose(live) == [right(live.token_ids)]


def test_guesses_stop_at_an_id_that_ends_the_sequence() -> None:
    ids = prompt(6)
    guesses = right(ids)
    bench = Bench()
    assert bench.propose(Live(1, ids, [1, 2, 3], end_token_ids=(guesses[1],))) == [guesses[:2]]
    assert bench.runner.num_tokens == [6, 1]


def test_end_ids_are_not_guessed_before_min_tokens() -> None:
    ids = prompt(6)
    guesses = right(ids)
    params = SamplingParams(temperature=0.0, min_tokens=2)
    live = Live(1, ids, [1, 2, 3], params=params, end_token_ids=(guesses[0],))
    [found] = Bench().propose(live)
    assert found[0] != guesses[0]
    assert len(found) == 3


def test_rows_hold_history_and_guesses_and_ask_for_no_logprobs() -> None:
    seen: list[list[int]] = []

    def watch(token_ids: list[int]) -> bool:
        seen.append(list(token_ids))
        return False

    bench = Bench(is_bad=watch)
    params = SamplingParams(temperature=0.0, logprobs=3, presence_penalty=1.0)
    live = Live(1, prompt(6), [1, 2, 3], params=params)
    before = list(live.token_ids)
    [guesses] = bench.propose(live)
    assert seen == [before, before + guesses[:1], before + guesses[:2]]
    assert live.token_ids == before, "the sequence's own list is left alone"
    assert all(row.params.logprobs is None for row in bench.runner.rows)
    assert all(row.params.presence_penalty == 1.0 for row in bench.runner.rows)


def test_guesses_end_with_the_drafts_context() -> None:
    bench = Bench(max_seq_len=8)
    assert bench.propose(Live(1, prompt(7), [1, 2, 3]))[0] == right(prompt(7), 2)
    assert bench.propose(Live(2, prompt(8), [4, 5, 6]))[0] == right(prompt(8), 1)
    assert bench.propose(Live(3, prompt(9), [7, 8, 9])) == [[]]
    assert max(int(batch.positions.max()) for batch in bench.runner.batches) == 7


def test_check_finds_a_draft_without_its_sequence() -> None:
    bench = Bench()
    bench.propose(Live(1, prompt(3), [1, 2]), Live(2, prompt(3), [3, 4]))
    bench.drafter.check({1, 2, 3})
    with pytest.raises(AssertionError, match="outlived"):
        bench.drafter.check({1})
    bench.drafter.forget(2)
    bench.drafter.forget(2)
    bench.drafter.check({1})


WINDOWED = (CacheGroup(num_layers=1, window=8, bytes_per_token=8),)
MIXED = (CacheGroup(num_layers=1, window=None, bytes_per_token=8), *WINDOWED)


@pytest.mark.parametrize(
    ("draft", "target", "message"),
    [
        ({"vocab_size": 90}, {}, "90 token ids and the target 97"),
        ({"cache_groups": WINDOWED}, {}, "draft model has sliding windows"),
        ({"cache_groups": MIXED}, {}, "draft model has sliding windows"),
        ({}, {"cache_groups": WINDOWED}, "target model has sliding windows"),
        ({}, {"cache_groups": MIXED}, "target model has sliding windows"),
    ],
)
def test_models_that_do_not_go_together_are_refused(
    draft: dict[str, object], target: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DraftModelDrafter(FakeRunner(make_info(**draft)), make_info(**target), make_config())


@pytest.mark.parametrize("num_blocks", [64, 14])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_engine_accepts_every_guess_of_its_own_model(temperature: float, num_blocks: int) -> None:
    """With prefix hits, copies, choices and, in the small pool, preemptions."""
    config = SpeculationConfig(method="draft", num_draft_tokens=3, is_always_on=True)
    sizes = {"num_blocks": num_blocks, "max_seq_len": 48, "max_batched_tokens": 16}
    runner = WatchedRunner(make_info())
    drafter = DraftModelDrafter(runner, make_info(), make_config(**sizes))
    guessing = make_engine(drafter=drafter, speculation=config, **sizes)
    plain = make_engine(**sizes)
    tokens = []
    for engine in (guessing, plain):
        rng = random.Random(num_blocks)
        shared = prompt(13)
        for index in range(8):
            ids = shared[: rng.choice([8, 10, 13])] + prompt(rng.choice([0, 0, 5]), index)
            engine.add_request(
                make_request(
                    str(index), ids, temperature=temperature, max_tokens=20, n=rng.choice([1, 2])
                )
            )
        tokens.append(tokens_by_choice(run(engine)))
    stats = guessing.stats()
    assert tokens[0] == tokens[1]
    assert stats.num_draft_tokens == stats.num_accepted_tokens > 30
    assert (stats.num_preemptions > 0) == (num_blocks == 14)
    assert stats.num_steps < plain.stats().num_steps
