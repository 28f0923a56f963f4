"""Batches: every row once in a pass, in an order that needs no memory; cut rows are counted."""

from __future__ import annotations

import random

import pytest
import torch

from llmserve.errors import DataError
from llmserve.training.finetune_examples import (
    IGNORED,
    Lengths,
    RowOrder,
    TokenRow,
    batches,
    fill_up,
)

LENGTHS = [random.Random(0).randint(1, 90) for _ in range(101)]


def test_each_pass_has_every_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(LENGTHS, batch_size=8, seed=3)
    assert order.batches_per_epoch == 13
    passes = [[order.batch(13 * epoch + i) for i in range(13)] for epoch in range(3)]
    for batches_of_pass in passes:
        assert sorted(row for batch in batches_of_pass for row in batch) == list(range(101))
    assert passes[0] != passes[1]


def test_a_resumed_order_goes_on_where_it_was() -> None:
    whole = RowOrder(LENGTHS, batch_size=8, seed=3)
    expected = [whole.batch(position) for position in range(40)]
    assert [RowOrder(LENGTHS, batch_size=8, seed=3).batch(p) for p in range(40)] == expected
    assert RowOrder(LENGTHS, batch_size=8, seed=4).batch(0) != expected[0]


def test_rows_of_like_length_come_together() -> None:
    order = RowOrder(LENGTHS, batch_size=8, seed=0)
    filled = sum(8 * max(LENGTHS[row] for row in order.batch(position)) for position in range(13))
    assert filled < 1.3 * sum(LENGTHS)
    assert sorted(i for batch in batches(LENGTHS, 7) for i in batch) == list(range(101))


def test_targets_are_the_ids_that_are_marked() -> None:
    row = TokenRow.predicting([5, 6, 7, 8], [True, False, True, True])
    assert row.targets == (IGNORED, 7, 8, IGNORED)
    assert row.num_targets == 2
    assert row.cut(3) == TokenRow((5, 6, 7), (IGNORED, 7, IGNORED))


def test_long_rows_are_cut_left_out_or_refused_and_counted() -> None:
    short = TokenRow.predicting([1, 2, 3], [True] * 3)
    long = TokenRow.predicting([1, 2, 3, 4, 5], [False, False, True, True, True])
    late = TokenRow.predicting([1, 2, 3, 4, 5], [False, False, False, False, True])
    cutting, dropping = Lengths(3, "truncate"), Lengths(3, "drop")
    assert cutting.fit(short, "p") is short
    assert cutting.fit(long, "p") == long.cut(3)
    assert cutting.fit(late, "p") is None
    assert (cutting.num_truncated, cutting.num_dropped) == (1, 1)
    assert "1 texts cut to 3 tokens; 1 rows left out" in cutting.describe()
    assert dropping.fit(long, "p") is None
    assert (dropping.num_truncated, dropping.num_dropped) == (0, 1)
    with pytest.raises(DataError, match="p: has 5 tokens; at most 3"):
        Lengths(3, "refuse").fit(long, "p")


def test_batches_are_filled_up_on_the_right() -> None:
    ids, targets, last = fill_up([TokenRow((1, 2, 3), (2, IGNORED, IGNORED)), TokenRow((4,))])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert targets.tolist() == [[2, IGNORED, IGNORED], [IGNORED] * 3]
    assert torch.equal(last, torch.tensor([2, 0]))
