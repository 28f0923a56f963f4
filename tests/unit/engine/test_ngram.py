"""Guesses by looking up the last tokens in the sequence itself."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from llmserve.engine.config import SpeculationConfig
from llmserve.engine.drafting import DraftRequest
from llmserve.engine.ngram import NgramDrafter
from llmserve.runners.protocol import SamplingRow
from llmserve.sampling import SamplingParams


def make_drafter(min_ngram: int = 2, max_ngram: int = 4) -> NgramDrafter:
    return NgramDrafter(SpeculationConfig(method="ngram", min_ngram=min_ngram, max_ngram=max_ngram))


def make_request(
    token_ids: list[int], num_tokens: int = 4, *, key: int = 0, end_token_ids: tuple[int, ...] = ()
) -> DraftRequest:
    row = SamplingRow(
        params=SamplingParams(),
        seed=0,
        choice_index=0,
        token_ids=token_ids,
        num_prompt_tokens=1,
        end_token_ids=end_token_ids,
    )
    return DraftRequest(key=key, row=row, num_tokens=num_tokens, block_tables=[])


def propose(drafter: NgramDrafter, token_ids: list[int], num_tokens: int = 4) -> list[int]:
    return drafter.propose([make_request(token_ids, num_tokens)])[0]


def scan(token_ids: list[int], lengths: range, num_tokens: int) -> list[int]:
    """The oracle: look backwards for the longest match, and copy one token after the other."""
    for length in sorted(lengths, reverse=True):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[-length:]:
                copy = list(token_ids)
                for place in range(num_tokens):
                    copy.append(copy[end + place])
                return copy[len(token_ids) :]
    return []


def test_what_followed_the_same_tokens_is_proposed() -> None:
    assert propose(make_drafter(), [1, 2, 3, 4, 5, 6, 9, 1, 2]) == [3, 4, 5, 6]


def test_nothing_is_proposed_without_a_match() -> None:
    assert propose(make_drafter(), [1, 2, 3, 4, 1, 3]) == []


def test_longer_match_wins_over_a_later_one() -> None:
    token_ids = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    assert propose(make_drafter(2, 3), token_ids, 1) == [7]
    assert propose(make_drafter(2, 2), token_ids, 1) == [8]


def test_repetition_is_proposed_to_go_on() -> None:
    assert propose(make_drafter(), [5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(("min_ngram", "max_ngram"), [(1, 1), (1, 3), (2, 4), (3, 3)])
def test_growing_sequences_are_guessed_as_a_naive_scan_would(
    min_ngram: int, max_ngram: int
) -> None:
    rng = random.Random(min_ngram * 10 + max_ngram)
    drafter = make_drafter(min_ngram, max_ngram)
    sequences = [[rng.randrange(3 + key)] for key in range(4)]
    num_guessed = 0
    for _ in range(150):
        requests = []
        for key, token_ids in enumerate(sequences):
            token_ids += [rng.randrange(3 + key) for _ in range(rng.randrange(4))]
            if rng.random() < 0.7:
                requests.append(make_request(token_ids, rng.randint(1, 6), key=key))
        for request, guesses in zip(requests, drafter.propose(requests), strict=True):
            lengths = range(min_ngram, max_ngram + 1)
            assert guesses == scan(request.row.token_ids, lengths, request.num_tokens)
            num_guessed += bool(guesses)
    assert num_guessed > 100


def test_guesses_stop_at_an_id_that_ends_the_sequence() -> None:
    token_ids = [1, 2, 3, 99, 4, 5, 1, 2]
    request = make_request(token_ids, end_token_ids=(98, 99))
    assert make_drafter().propose([request]) == [[3, 99]]


def test_forgotten_sequence_is_indexed_anew() -> None:
    drafter = make_drafter()
    propose(drafter, [1, 2, 3, 4, 1, 2])
    drafter.forget(0)
    drafter.forget(0)
    assert propose(drafter, [7, 8, 1, 2]) == []
    assert propose(drafter, [7, 8, 1, 2, 7, 8]) == [1, 2, 7, 8]


def test_check_finds_an_index_without_its_sequence() -> None:
    drafter = make_drafter()
    drafter.propose([make_request([1, 2], key=1), make_request([1, 2], key=2)])
    drafter.check({1, 2, 3})
    with pytest.raises(AssertionError, match="outlived"):
        drafter.check({1})
    drafter.forget(2)
    drafter.check({1})


class CountingList(list[int]):
    """Counts the tokens that are read."""

    num_read = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        item = super().__getitem__(index)
        self.num_read += len(item) if isinstance(index, slice) else 1
        return item


def test_each_new_token_is_read_a_bounded_number_of_times() -> None:
    rng = random.Random(0)
    drafter = make_drafter(2, 4)
    token_ids = CountingList(rng.randrange(50) for _ in range(5_000))
    propose(drafter, token_ids)
    for _ in range(50):
        token_ids.append(rng.randrange(50))
        token_ids.num_read = 0
        propose(drafter, token_ids)
        assert token_ids.num_read <= 2 * (2 + 3 + 4) + 4


def test_entry_of_the_index_takes_under_250_bytes() -> None:
    rng = random.Random(0)
    token_ids = [rng.randrange(30_000) for _ in range(5_000)]
    drafter = make_drafter(2, 4)
    tracemalloc.start()
    try:
        propose(drafter, token_ids)
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes < 250 * 3 * len(token_ids)
