"""Guesses from the sequence itself: what followed the same words the last time.

Answers repeat their prompts: names, quotations, code that is edited. So the last few tokens are
looked up in the sequence so far, and what followed them there is the guess (Saxena 2023, "Prompt
Lookup Decoding"; Yang et al. 2023, arXiv:2304.04487, section 2). It needs no model and no training.
"""

from __future__ import annotations

from ..runners.protocol import SamplingRow
from .config import SpeculationConfig
from .drafting import DraftRequest

__all__ = ["NgramDrafter"]


class NgramDrafter:
    """Implements `Drafter` by the longest match of the last `max_ngram`..`min_ngram` tokens.

    Of matches of one length the latest counts. Where fewer tokens follow it than are asked for, the
    guess goes on with itself, as if what has begun to repeat went on repeating.

    A token is indexed once, with max_ngram - min_ngram + 1 entries of under 250 bytes each: O(1)
    for each new token and guess, whatever the sequence's length.
    """

    reads_blocks = False

    def __init__(self, config: SpeculationConfig) -> None:
        self._lengths = range(config.max_ngram, config.min_ngram - 1, -1)
        self._indexes: dict[int, _Index] = {}

    def propose(self, requests: list[DraftRequest]) -> list[list[int]]:
        """What followed the same tokens before, cut behind the first id that ends the sequence."""
        return [self._guess(request) for request in requests]

    def forget(self, key: int) -> None:
        """Drop a sequence's index."""
        self._indexes.pop(key, None)

    def check(self, keys: set[int]) -> None:
        """Raise AssertionError if there is an index of a sequence that is not among `keys`."""
        assert self._indexes.keys() <= keys, "an index outlived its sequence"

    def _guess(self, request: DraftRequest) -> list[int]:
        index = self._indexes.get(request.key)
        if index is None:
            index = self._indexes[request.key] = _Index(self._lengths)
        token_ids = request.row.token_ids
        start = index.find(token_ids)
        if start is None:
            return []
        period = len(token_ids) - start
        guesses = [token_ids[start + place % period] for place in range(request.num_tokens)]
        return _until_end(guesses, request.row)


class _Index:
    """Where each n-gram of one sequence ended last, its very last tokens left out."""

    __slots__ = ("_ends", "_lengths", "_next_end")

    def __init__(self, lengths: range) -> None:
        self._lengths = lengths  # descending
        self._ends: dict[tuple[int, ...], int] = {}
        self._next_end = lengths[-1]

    def find(self, token_ids: list[int]) -> int | None:
        """The position behind the best earlier match of the last tokens, if there is one."""
        self._extend(token_ids)
        for length in self._lengths:
            end = self._ends.get(tuple(token_ids[-length:]))
            if end is not None:
                return end
        return None

    def _extend(self, token_ids: list[int]) -> None:
        ends = self._ends
        for end in range(self._next_end, len(token_ids)):
            for length in self._lengths:
                if length <= end:
                    ends[tuple(token_ids[end - length : end])] = end
        self._next_end = max(self._next_end, len(token_ids))


def _until_end(guesses: list[int], row: SamplingRow) -> list[int]:
    for place, token_id in enumerate(guesses):
        if token_id in row.end_token_ids:
            return guesses[: place + 1]
    return guesses
