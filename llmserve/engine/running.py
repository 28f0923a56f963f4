"""The running sequences as a struct of arrays: what a step needs of all of them at once.

Each running sequence has a row. One step then costs a few operations over whole columns, and per
sequence only what Python objects force: its token list and its output.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..runners.protocol import BoolArray, IntArray
from .sequence import Sequence

__all__ = ["RunningTable", "SortKey"]

SortKey = tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    decoding: list[Sequence]
    decode_rows: IntArray
    are_repeatable: bool
    prefilling: list[Sequence]


class RunningTable:
    """Rows for at most `capacity` sequences, and their order of service.

    Columns are indexed by row. Who decodes and who still computes its prompt is found once for
    each change, not in each step.
    """

    def __init__(self, capacity: int, sort_key: Callable[[Sequence], SortKey]) -> None:
        self._sort_key = sort_key
        self._free_rows = list(range(capacity - 1, -1, -1))
        self.sequences: list[Sequence] = []
        """In order of service; the last is the first to be preempted."""
        self.num_computed: IntArray = np.zeros(capacity, dtype=np.int64)
        """Tokens whose keys and values are in the cache."""
        self.max_len: IntArray = np.zeros(capacity, dtype=np.int64)
        self.last_token: IntArray = np.zeros(capacity, dtype=np.int64)
        self.is_decoding: BoolArray = np.zeros(capacity, dtype=np.bool_)
        """Whether the row has drawn a token since it was admitted: then it goes on one by one."""
        self.adapter_id: IntArray = np.zeros(capacity, dtype=np.int64)
        self.tenant_id: IntArray = np.zeros(capacity, dtype=np.int64)
        self.num_with_adapter = 0
        """Running sequences that use an adapter."""
        self._capacity = capacity
        self._split: _Split | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def decoding(self) -> list[Sequence]:
        """Those that decode, in order of service; a list that nobody changes."""
        return self._parts().decoding

    @property
    def decode_rows(self) -> IntArray:
        """Their rows."""
        return self._parts().decode_rows

    @property
    def are_repeatable(self) -> bool:
        """Whether they all may draw several tokens in one step, and there are some."""
        return self._parts().are_repeatable

    @property
    def prefilling(self) -> list[Sequence]:
        """Those that do not decode yet, in order of service; a list that nobody changes."""
        return self._parts().prefilling

    @property
    def is_full(self) -> bool:
        """Whether no row is left."""
        return not self._free_rows

    def add(self, sequence: Sequence, *, num_computed: int, adapter_id: int, tenant_id: int) -> int:
        """Give a sequence a row and its place in the order. O(log n) comparisons."""
        row = self._free_rows.pop()
        sequence.row = row
        self.num_computed[row] = num_computed
        self.max_len[row] = sequence.max_len
        self.last_token[row] = sequence.token_ids[-1]
        self.is_decoding[row] = False
        self.adapter_id[row] = adapter_id
        self.tenant_id[row] = tenant_id
        self.num_with_adapter += adapter_id != 0
        insort(self.sequences, sequence, key=self._sort_key)
        self._split = None
        return row

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence's row away. O(n)."""
        row = sequence.row
        self.sequences.remove(sequence)
        self.num_with_adapter -= bool(self.adapter_id[row])
        self._free_rows.append(row)
        sequence.row = -1
        self._split = None

    def settle(self, sequence: Sequence) -> None:
        """Note that tokens were drawn: all known ones but the last are in the cache."""
        row = sequence.row
        self.num_computed[row] = len(sequence.token_ids) - 1
        self.last_token[row] = sequence.token_ids[-1]
        if not self.is_decoding[row]:
            self.is_decoding[row] = True
            self._split = None

    def append_one(self, rows: IntArray, tokens: IntArray) -> None:
        """Note one computed and one drawn token for each row."""
        self.num_computed[rows] += 1
        self.last_token[rows] = tokens

    def _parts(self) -> _Split:
        """O(n) after a change, else O(1)."""
        if self._split is None:
            decoding: list[Sequence] = []
            prefilling: list[Sequence] = []
            for sequence in self.sequences:
                (decoding if self.is_decoding[sequence.row] else prefilling).append(sequence)
            rows = np.array([sequence.row for sequence in decoding], dtype=np.int64)
            are_repeatable = bool(decoding) and all(one.is_repeatable for one in decoding)
            self._split = _Split(decoding, rows, are_repeatable, prefilling)
        return self._split

    def check(self) -> None:
        """Raise AssertionError if rows, order or columns disagree with the sequences."""
        keys = [self._sort_key(sequence) for sequence in self.sequences]
        assert keys == sorted(keys), "the running sequences are out of order"
        used = {sequence.row for sequence in self.sequences}
        assert len(used) == len(self.sequences), "two sequences share a row"
        assert used.isdisjoint(self._free_rows), "a row is free and in use"
        assert len(used) + len(self._free_rows) == self._capacity, "a row is lost"
        assert self.decode_rows.tolist() == [sequence.row for sequence in self.decoding]
        parts = {id(sequence) for sequence in (*self.decoding, *self.prefilling)}
        assert parts == {id(sequence) for sequence in self.sequences}, "a sequence is in no part"
        assert self.num_with_adapter == np.count_nonzero(self.adapter_id[list(used)])
        for sequence in self.sequences:
            row = sequence.row
            num_tokens, num_computed = len(sequence.token_ids), int(self.num_computed[row])
            assert self.last_token[row] == sequence.token_ids[-1]
            assert 0 <= num_computed < num_tokens, "nothing is left to compute"
            is_decoding = bool(self.is_decoding[row])
            assert is_decoding == (sequence in self.decoding), "a sequence is in the wrong part"
            assert not is_decoding or num_computed == num_tokens - 1, "a token is not counted"
