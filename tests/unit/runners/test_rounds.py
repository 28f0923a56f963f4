"""Several rounds of decoding in one step: the tokens of as many steps."""

from __future__ import annotations

import numpy as np

from llmserve.runners.protocol import StepResult
from llmserve.runners.rounds import Ends, common_ends, join_rounds, next_round, rows_after
from support.batches import Share, make_batch, make_row


def test_the_next_round_computes_what_was_drawn_one_place_on() -> None:
    rows = [make_row([1] * 7), make_row([2] * 12)]
    batch = make_batch(
        [
            Share(token_ids=[1], first=6, tables=[[5, 2], [1, 3]], rows=rows[:1]),
            Share(token_ids=[2], first=11, tables=[[4, 6, 8, 9], [0, 2, 4, 6]], rows=rows[1:]),
        ],
        block_size=4,
        copies=[[(0, 1)], []],
    )
    after = next_round(batch, np.array([30, 31]), 4)
    again = next_round(after, np.array([40, 41]), 4)
    assert after.token_ids.tolist() == [30, 31]
    assert after.positions.tolist() == [7, 12]
    assert after.context_lens.tolist() == [8, 13]
    assert [one.slot_mapping.tolist() for one in after.groups] == [[2 * 4 + 3, 9 * 4], [15, 24]]
    assert all(len(one.block_copies) == 0 for one in after.groups), "copied once"
    assert [row.token_ids for row in again.sampling] == [[1] * 7 + [30, 40], [2] * 12 + [31, 41]]
    assert batch.positions.tolist() == [6, 11], "the first round's are changed"


def test_rows_after_rounds_are_new_ones() -> None:
    rows = [make_row([1, 2]), make_row([3])]
    after = rows_after(rows, [np.array([4, 5]), np.array([6, 7])])
    assert [row.token_ids for row in after] == [[1, 2, 4, 6], [3, 5, 7]]
    assert [row.token_ids for row in rows] == [[1, 2], [3]]


def test_ends_are_met_once_every_row_has_drawn_one() -> None:
    rows = [make_row([1]), make_row([2]), make_row([3])]
    for row in rows:
        row.end_token_ids = (7, 9)
    ends = Ends(rows)
    assert not ends.are_met(np.array([7, 1, 2]))
    assert not ends.are_met(np.array([1, 1, 9]))
    assert ends.are_met(np.array([1, 7, 1]))
    rows[0].end_token_ids = ()
    assert common_ends(rows) == ()
    assert not Ends(rows).are_met(np.array([7, 7, 7]))
    assert common_ends([]) == ()


def test_joined_rounds_are_unusable_in_the_last_alone() -> None:
    good = StepResult(token_ids=np.array([1, 2]))
    bad = StepResult(token_ids=np.array([3, 0]), is_finite=np.array([True, False]))
    assert join_rounds([bad]) is bad
    both = join_rounds([good, bad])
    assert both.token_ids.tolist() == [1, 2, 3, 0]
    assert both.is_finite is not None
    assert both.is_finite.tolist() == [True, True, True, False]
    assert join_rounds([good, good]).is_finite is None
