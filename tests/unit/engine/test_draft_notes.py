"""Which blocks a draft model need not compute again, because it wrote them for the same tokens.

What is right is what the scripted runner reads back from its cache (test_draft_model.py).
"""

from __future__ import annotations

import pytest

from support.draft_runner import Bench, Live, prompt, right
from support.engines import VOCAB


def test_sequence_that_shares_blocks_computes_only_what_is_not_written() -> None:
    bench = Bench()
    first = Live(1, prompt(11), [5, 6, 7, 8], salt="a")
    bench.propose(first)
    second = Live(2, first.token_ids[:8] + prompt(2, 1), [5, 6, 9, 10], salt="a")
    assert bench.propose(second, num_tokens=1) == [right(second.token_ids, 1)]
    assert bench.runner.num_tokens == [11, 1, 1, 2]


def test_blocks_outlive_the_sequence_that_wrote_them() -> None:
    bench = Bench()
    first = Live(1, prompt(11), [5, 6, 7, 8], salt="a")
    bench.propose(first, num_tokens=1)
    bench.drafter.forget(1)
    again = Live(3, list(first.token_ids), [5, 6, 20, 21], salt="a")
    assert bench.propose(again, num_tokens=1) == [right(again.token_ids, 1)]
    assert bench.runner.num_tokens == [11, 3]


def test_blocks_filled_by_accepted_guesses_are_passed_over_too() -> None:
    bench = Bench()
    first = Live(1, prompt(6), list(range(10)), salt="a")
    for _ in range(3):
        bench.propose(first)
        first.token_ids += right(first.token_ids, 4)
    bench.propose(first, num_tokens=1)
    second = Live(2, list(first.token_ids), [0, 1, 2, 3, 20, 21], salt="a")
    assert bench.propose(second, num_tokens=1) == [right(second.token_ids, 1)]
    assert bench.runner.num_tokens[-1] == len(first.token_ids) - 16


def test_whole_shared_prompt_still_computes_its_last_token() -> None:
    bench = Bench()
    first = Live(1, prompt(8), [5, 6, 7], salt="a")
    bench.propose(first)
    second = Live(2, list(first.token_ids), [5, 6, 9], salt="a")
    assert bench.propose(second) == [right(first.token_ids)]
    assert bench.runner.num_tokens == [8, 1, 1, 1, 1, 1]
    third = Live(3, list(first.token_ids), [5, 6, 10], salt="a")
    assert bench.propose(third, num_tokens=1) == [right(first.token_ids, 1)]
    assert bench.runner.num_tokens[-1] == 1


def test_copied_tail_is_computed_by_the_draft_itself() -> None:
    """The target copied block 6 to 9 for the second sequence; the draft was not told."""
    bench = Bench()
    first = Live(1, prompt(7), [5, 6, 7], salt="a")
    bench.propose(first)
    second = Live(2, list(first.token_ids), [5, 9, 10], salt="a")
    assert bench.propose(second) == [right(second.token_ids)]


@pytest.mark.parametrize("salt", ["b", None])
def test_blocks_of_another_name_are_not_passed_over(salt: str | None) -> None:
    bench = Bench()
    bench.propose(Live(1, prompt(11), [5, 6, 7, 8], salt="a"), num_tokens=1)
    other = Live(2, prompt(11), [5, 6, 7, 8], salt=salt)
    assert bench.propose(other, num_tokens=1) == [right(other.token_ids, 1)]
    assert bench.runner.num_tokens == [11, 11]


def test_block_that_was_written_over_is_not_passed_over() -> None:
    bench = Bench()
    first = Live(1, prompt(11), [5, 6, 7, 8], salt="a")
    bench.propose(first, num_tokens=1)
    bench.drafter.forget(1)
    bench.propose(Live(2, prompt(3, 1), [6, 9]), num_tokens=1)
    again = Live(3, list(first.token_ids), [5, 6, 7, 8], salt="a")
    assert bench.propose(again, num_tokens=1) == [right(again.token_ids, 1)]
    assert bench.runner.num_tokens[-1] == 7


def test_block_written_over_by_guesses_is_not_passed_over() -> None:
    bench = Bench()
    first = Live(1, prompt(11), [5, 6, 7, 8], salt="a")
    bench.propose(first, num_tokens=1)
    bench.drafter.forget(1)
    bench.propose(Live(2, prompt(3, 1), [20, 6], salt="a"), num_tokens=3)
    again = Live(3, list(first.token_ids), [5, 6, 7, 8], salt="a")
    assert bench.propose(again, num_tokens=1) == [right(again.token_ids, 1)]


def test_block_noted_before_a_rejected_guess_stays_noted() -> None:
    bench = Bench()
    first = Live(1, prompt(8), [5, 6, 7, 8], salt="a")
    bench.propose(first)
    first.token_ids.append((right(first.token_ids, 1)[0] + 1) % VOCAB)
    bench.propose(first)
    second = Live(2, first.token_ids[:8] + prompt(1), [5, 6, 9], salt="a")
    bench.propose(second, num_tokens=1)
    assert bench.runner.num_tokens[-1] == 1


def test_choices_of_one_prompt_compute_it_once() -> None:
    bench = Bench(max_batched_tokens=16)
    ids = prompt(26)
    lives = [
        Live(
            key,
            ids + prompt(2, 10 + key),
            [*range(6), *range(20 + 4 * key, 24 + 4 * key)],
            salt="a",
        )
        for key in range(4)
    ]
    for _ in range(8):
        guesses = bench.propose(*lives, num_tokens=1)
    assert guesses == [right(live.token_ids, 1) for live in lives]
    first_calls = sum(bench.runner.num_tokens) - 8 * 4
    assert first_calls <= 24 + 4 * 4


def test_blocks_of_a_broken_sequence_are_not_trusted() -> None:
    bad = prompt(9)
    bench = Bench(is_bad=lambda token_ids: token_ids == bad, max_batched_tokens=8)
    live = Live(1, list(bad), [5, 6, 7], salt="a")
    bench.propose(live)
    bench.propose(live)
    other = Live(2, bad[:8] + prompt(1, 1), [5, 6, 8], salt="a")
    bench.propose(other)
    assert bench.runner.num_tokens == [8, 1, 8]


def test_being_asked_twice_loses_no_note() -> None:
    bench = Bench()
    first = Live(1, prompt(8), [5, 6, 7], salt="a")
    bench.propose(first)
    bench.propose(first)
    second = Live(2, list(first.token_ids), [5, 6, 9], salt="a")
    assert bench.propose(second, num_tokens=1) == [right(first.token_ids, 1)]
    assert bench.runner.num_tokens[-1] == 1
