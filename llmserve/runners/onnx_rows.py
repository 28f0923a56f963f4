"""Which row of the graph's cache belongs to which sequence.

The engine deals in blocks; the graph wants each sequence's keys in one piece, and those that decode
together in neighbouring rows. No two sequences hold the same block (`RunnerInfo.shares_blocks`), so
a sequence is known by its first one. A row is given up when its sequence's first block becomes
another's. So there are never more rows in use than blocks, nor more tokens in them than in the
pool, as long as what a row held is forgotten when it is given up (`released`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from .protocol import Batch, IntArray

__all__ = ["RowTable"]


class RowTable:
    """Rows by sequence. Lowest free rows are given out first."""

    def __init__(self, num_rows: int, block_size: int) -> None:
        """Start with `num_rows` free rows; there are as many blocks."""
        self._block_size = block_size
        self._free = list(range(num_rows))
        self._row_of: dict[int, int] = {}
        self._block_of: dict[int, int] = {}
        self.lengths: IntArray = np.zeros(num_rows, np.int64)
        """Tokens in each row."""
        self.released: list[int] = []
        """Rows whose sequences were found to have ended in the last `place`."""

    def place(self, batch: Batch) -> list[int]:
        """The row of each sequence of a step, given out where it is new. O(tokens)."""
        self.released = []
        tables = batch.groups[0]
        firsts: list[int] = tables.block_tables[:, 0].tolist()
        begun = tables.slot_mapping[tables.slot_mapping % self._block_size == 0]
        if len(begun):
            taken = set((begun // self._block_size).tolist())
            starts = batch.positions[batch.cu_seqlens[:-1]].tolist()
            going_on = {block for block, start in zip(firsts, starts, strict=True) if start}
            for block in (taken & self._row_of.keys()) - going_on:
                self._release(block)
        rows = [self._row_for(block) for block in firsts]
        self.lengths[rows] = batch.context_lens
        return rows

    def _row_for(self, block: int) -> int:
        row = self._row_of.get(block)
        if row is None:
            row = heapq.heappop(self._free)
            self._row_of[block], self._block_of[row] = row, block
        return row

    def _release(self, block: int) -> None:
        row = self._row_of.pop(block)
        del self._block_of[row]
        self.lengths[row] = 0
        self.released.append(row)
        heapq.heappush(self._free, row)

    def misplaced(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs (row, other) to exchange so that `rows` become the first ones, in any order."""
        wanted, count = set(rows), len(rows)
        outside = (row for row in rows if row >= count)
        inside = (row for row in range(count) if row not in wanted)
        return list(zip(outside, inside, strict=True))

    def exchange(self, row: int, other: int) -> None:
        """Note that two rows changed places; `row` is in use."""
        block, other_block = self._block_of.pop(row), self._block_of.pop(other, None)
        self._row_of[block], self._block_of[other] = other, block
        if other_block is None:
            self._free.remove(other)
            heapq.heapify(self._free)
            heapq.heappush(self._free, row)
        else:
            self._row_of[other_block], self._block_of[row] = row, other_block
        self.lengths[[row, other]] = self.lengths[[other, row]]
