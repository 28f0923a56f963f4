"""The running sequences as a struct of arrays: what a step needs of all of them at once.

Each running sequence has a row. One step then costs a few operations over whole columns, and per
sequence only what Python objects force: its token list and its output.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

import numpy as np

from ..runners.protocol import BoolArray, IntArray
from .sequence import Sequence

__all__ = ["NO_TOKEN", "RunningTable", "SortKey"]

SortKey = tuple[float, ...]

NO_TOKEN = -1
_NUM_STOP_COLUMNS = 4


class RunningTable:
    """Rows for at most `capacity` sequences, and their order of service.

    Columns are indexed by row; `rows` lists the rows in use in order of service.
    """

    def __init__(self, capacity: int, sort_key: Callable[[Sequence], SortKey]) -> None:
        self._sort_key = sort_key
        self._free_rows = list(range(capacity - 1, -1, -1))
        self.sequences: list[Sequence] = []
        """In order of service; the last is the first to be preempted."""
        self._rows: IntArray | None = None
        self.by_row: list[Sequence | None] = [None] * capacity
        self.num_tokens: IntArray = np.zeros(capacity, dtype=np.int64)
        """Tokens known, prompt and output."""
        self.num_computed: IntArray = np.zeros(capacity, dtype=np.int64)
        """Tokens whose keys and values are in the cache."""
        self.max_len: IntArray = np.zeros(capacity, dtype=np.int64)
        self.last_token: IntArray = np.zeros(capacity, dtype=np.int64)
        self.is_decoding: BoolArray = np.zeros(capacity, dtype=np.bool_)
        """Whether the row has drawn a token since it was admitted: then it goes on one by one."""
        self.adapter_id: IntArray = np.zeros(capacity, dtype=np.int64)
        self.tenant_id: IntArray = np.zeros(capacity, dtype=np.int64)
        self._stop_ids: IntArray = np.full((capacity, _NUM_STOP_COLUMNS), NO_TOKEN, dtype=np.int64)
        self._has_more_stops: BoolArray = np.zeros(capacity, dtype=np.bool_)
        self._num_with_more_stops = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def rows(self) -> IntArray:
        """Row of each entry of `sequences`. O(n) after a change, else O(1)."""
        if self._rows is None:
            self._rows = np.array([sequence.row for sequence in self.sequences], dtype=np.int64)
        return self._rows

    @property
    def is_full(self) -> bool:
        """Whether no row is left."""
        return not self._free_rows

    def add(self, sequence: Sequence, *, num_computed: int, adapter_id: int, tenant_id: int) -> int:
        """Give a sequence a row and its place in the order. O(log n) comparisons."""
        row = self._free_rows.pop()
        sequence.row = row
        self.by_row[row] = sequence
        self.num_tokens[row] = len(sequence.token_ids)
        self.num_computed[row] = num_computed
        self.max_len[row] = sequence.max_len
        self.last_token[row] = sequence.token_ids[-1]
        self.is_decoding[row] = False
        self.adapter_id[row] = adapter_id
        self.tenant_id[row] = tenant_id
        stops = sorted(sequence.stop_token_ids)
        self._stop_ids[row] = NO_TOKEN
        self._stop_ids[row, : len(stops)] = stops[:_NUM_STOP_COLUMNS]
        self._has_more_stops[row] = len(stops) > _NUM_STOP_COLUMNS
        self._num_with_more_stops += len(stops) > _NUM_STOP_COLUMNS
        insort(self.sequences, sequence, key=self._sort_key)
        self._rows = None
        return row

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence's row away. O(n)."""
        row = sequence.row
        self.sequences.remove(sequence)
        self._num_with_more_stops -= bool(self._has_more_stops[row])
        self.by_row[row] = None
        self._free_rows.append(row)
        sequence.row = -1
        self._rows = None

    def settle(self, sequence: Sequence) -> None:
        """Note that tokens were drawn: all known ones but the last are in the cache."""
        row = sequence.row
        self.num_tokens[row] = len(sequence.token_ids)
        self.num_computed[row] = len(sequence.token_ids) - 1
        self.last_token[row] = sequence.token_ids[-1]
        self.is_decoding[row] = True

    def pending(self, rows: IntArray) -> IntArray:
        """Tokens of each row that are not in the cache: 1 while decoding, more in prefill."""
        return self.num_tokens[rows] - self.num_computed[rows]

    def append_one(self, rows: IntArray, tokens: IntArray) -> BoolArray:
        """Note one computed and one drawn token for each row; which of them end a sequence."""
        self.num_computed[rows] += 1
        lengths = self.num_tokens[rows] + 1
        self.num_tokens[rows] = lengths
        self.last_token[rows] = tokens
        stops = (self._stop_ids[rows] == tokens[:, None]).any(axis=1)
        ends: BoolArray = (lengths >= self.max_len[rows]) | stops
        if self._num_with_more_stops:
            for index in np.flatnonzero(self._has_more_stops[rows]).tolist():
                sequence = self.by_row[int(rows[index])]
                assert sequence is not None, "a scheduled row is empty"
                ends[index] |= int(tokens[index]) in sequence.stop_token_ids
        return ends

    def check(self) -> None:
        """Raise AssertionError if rows, order or columns disagree with the sequences."""
        keys = [self._sort_key(sequence) for sequence in self.sequences]
        assert keys == sorted(keys), "the running sequences are out of order"
        assert self.rows.tolist() == [sequence.row for sequence in self.sequences]
        used = {sequence.row for sequence in self.sequences}
        assert len(used) == len(self.sequences), "two sequences share a row"
        assert used.isdisjoint(self._free_rows), "a row is free and in use"
        assert len(used) + len(self._free_rows) == len(self.by_row), "a row is lost"
        for sequence in self.sequences:
            row = sequence.row
            assert self.by_row[row] is sequence, "a row belongs to another sequence"
            assert self.num_tokens[row] == len(sequence.token_ids), "a token is not counted"
            assert self.last_token[row] == sequence.token_ids[-1]
            assert 0 <= self.num_computed[row] < self.num_tokens[row], "nothing is left to compute"
