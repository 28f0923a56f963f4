"""Rows of the graph's cache: who has which, and when one is given up."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.runners.onnx_rows import RowTable
from llmserve.runners.protocol import Batch, GroupTables

BLOCK = 4


def batch(*sequences: tuple[list[int], int, int]) -> Batch:
    """A step over sequences: blocks, first position and end."""
    width = max(len(blocks) for blocks, _, _ in sequences)
    tables = np.array([blocks + [0] * (width - len(blocks)) for blocks, _, _ in sequences])
    positions = [np.arange(start, end) for _, start, end in sequences]
    slots = [
        np.array(blocks)[places // BLOCK] * BLOCK + places % BLOCK
        for (blocks, _, _), places in zip(sequences, positions, strict=True)
    ]
    lengths = [len(places) for places in positions]
    return Batch(
        token_ids=np.zeros(sum(lengths), np.int64),
        positions=np.concatenate(positions),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
        context_lens=np.array([end for _, _, end in sequences]),
        groups=[
            GroupTables(
                slot_mapping=np.concatenate(slots),
                block_tables=tables,
                block_copies=np.empty((0, 2), np.int64),
            )
        ],
        logits_indices=np.empty(0, np.int64),
        sampling=[],
    )


def test_sequence_keeps_its_row() -> None:
    rows = RowTable(8, BLOCK)
    assert rows.place(batch(([5], 0, 3), ([2], 0, 4))) == [0, 1]
    assert rows.place(batch(([2, 7], 4, 5), ([5], 3, 4))) == [1, 0]
    assert rows.lengths[:2].tolist() == [4, 5]


def test_row_is_free_again_when_its_first_block_is_anothers() -> None:
    rows = RowTable(8, BLOCK)
    rows.place(batch(([5], 0, 3), ([2], 0, 4)))
    assert rows.place(batch(([2, 5], 4, 5))) == [1], "the sequence of block 5 has ended"
    assert rows.place(batch(([6], 0, 2))) == [0]


def test_first_block_of_a_dead_sequence_may_be_another_ones_first() -> None:
    rows = RowTable(2, BLOCK)
    rows.place(batch(([1], 0, 3), ([0], 0, 4)))
    assert rows.place(batch(([1], 0, 2))) == [0]
    assert rows.lengths[0] == 2
    assert rows.released == [0]


@pytest.mark.parametrize("seed", range(3))
def test_rows_never_run_out_and_no_two_sequences_share_one(seed: int) -> None:
    """A pool that is always full, sequences that come, grow, wait and go, in random order."""
    random = np.random.default_rng(seed)
    count = 12
    rows, free, live = RowTable(count, BLOCK), list(range(count)), {}
    stored: dict[int, int] = {}  # row → the sequence whose tokens are in it
    for number in range(400):
        while live and (len(free) < 2 or random.random() < 0.1):
            blocks, _ = live.pop(random.choice(list(live)))
            free += blocks
        live[number] = ([free.pop(0)], 0)
        scheduled = [one for one in live if one == number or random.random() < 0.7]
        step = []
        for one in scheduled:
            blocks, length = live[one]
            if length == len(blocks) * BLOCK and free:
                blocks.append(free.pop(0))
            end = min(length + 1, len(blocks) * BLOCK)
            step.append((one, blocks, min(length, end - 1), end))
            live[one] = (blocks, end)
        placed = rows.place(batch(*((blocks, start, end) for _, blocks, start, end in step)))
        assert len(set(placed)) == len(placed)
        for (one, _, start, _), row in zip(step, placed, strict=True):
            assert start == 0 or stored[row] == one
            stored[row] = one
        for row, other in rows.misplaced(placed):
            rows.exchange(row, other)
            stored[row], stored[other] = stored.get(other, -1), stored[row]
        assert set(rows.place(batch(*((b, e - 1, e) for _, b, _, e in step)))) == set(
            range(len(step))
        )
