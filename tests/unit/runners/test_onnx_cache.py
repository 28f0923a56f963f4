"""The graph's cache: what moves, what is forgotten, and room that follows the longest row."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.errors import ConfigError
from llmserve.runners.huge_pages import HUGE_PAGE
from llmserve.runners.onnx_cache import GraphCache


def test_what_a_row_held_is_forgotten() -> None:
    cache = GraphCache(2, (3, 2, 4096, 8))
    for tensor in cache.tensors:
        tensor[:] = 1.0
    cache.forget(1)
    for tensor in cache.tensors:
        assert not tensor[1].any()
        assert tensor[[0, 2]].all()


def test_rows_are_moved_and_exchanged_as_far_as_they_are_filled() -> None:
    cache = GraphCache(1, (3, 1, 8, 2))
    (tensor,) = cache.tensors
    tensor[0], tensor[1] = 1.0, 2.0
    cache.move(0, 2, 3)
    assert tensor[2, 0, :, 0].tolist() == [1.0] * 3 + [0.0] * 5
    cache.swap(0, 1, 4)
    assert tensor[0, 0, :, 0].tolist() == [2.0] * 4 + [1.0] * 4
    assert tensor[1, 0, :, 0].tolist() == [1.0] * 4 + [2.0] * 4


def test_more_than_the_address_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be reserved"):
        GraphCache(1, (1 << 20, 1 << 20, 1 << 10, 64))


def test_room_follows_the_longest_row_and_keeps_what_rows_hold() -> None:
    cache = GraphCache(2, (6, 2, 5000, 3), is_growing=True)
    random = np.random.default_rng(0)
    lengths = np.zeros(6, np.int64)
    expected = [np.zeros((6, 2, 5000, 3), np.float32) for _ in range(2)]
    rooms = [cache.room]
    for needed in (100, 145, 1000, 4990, 700, 30, 300):
        before = lengths.copy()
        lengths[:] = random.integers(1, needed + 1, 6)
        lengths[2], lengths[4] = needed, 0
        cache.fit(lengths)
        assert cache.room >= needed
        for tensor, wanted in zip(cache.tensors, expected, strict=True):
            for row, length in enumerate(lengths):
                kept = min(int(before[row]), int(length))
                assert (tensor[row, :, :kept] == wanted[row, :, :kept]).all()
                tensor[row, :, kept:length] = random.random((2, length - kept, 3))
                wanted[row, :, :length] = tensor[row, :, :length]
        rooms.append(cache.room)
    assert rooms == [144, 144, 272, 1040, 5000, 1040, 144, 528]


def test_room_does_not_follow_small_changes() -> None:
    cache = GraphCache(1, (2, 1, 5000, 2), is_growing=True)
    lengths = np.array([1000, 0])
    cache.fit(lengths)
    (tensor,) = cache.tensors
    lengths[0] = 500
    cache.fit(lengths)
    assert cache.tensors[0] is tensor


def test_row_that_is_nobodys_holds_no_memory_of_an_earlier_layout() -> None:
    cache = GraphCache(1, (2, 1, 600, 2), is_growing=True)
    cache.tensors[0][:] = 1.0
    cache.fit(np.array([0, 300]))
    (tensor,) = cache.tensors
    assert not tensor[0].any()
    assert tensor[1, 0, :144].all()
    assert not tensor[1, 0, 144:].any()


def test_first_rows_keep_the_memory_that_they_may() -> None:
    tokens = HUGE_PAGE // (4 * 2 * 8)  # of a huge page: 8 rows of 4,096
    cache = GraphCache(1, (12, 2, 4096, 8), num_kept=tokens + 100)
    (tensor,) = cache.tensors
    tensor[:] = 1.0
    for row in range(12):
        cache.forget(row)
    assert tensor[:8].all()
    assert not tensor[8:].any()


def test_kept_memory_holds_what_rows_hold_in_another_layout() -> None:
    cache = GraphCache(1, (12, 2, 9000, 8), is_growing=True, num_kept=1 << 20)
    cache.tensors[0][:] = 1.0
    cache.tensors[0][3, :, :100] = 2.0
    lengths = np.zeros(12, np.int64)
    lengths[3] = 5000
    cache.fit(lengths)
    assert (cache.tensors[0][3, :, :100] == 2.0).all()
