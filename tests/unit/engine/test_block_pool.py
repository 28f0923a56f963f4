"""The pool of KV blocks."""

from __future__ import annotations

import random

import pytest

from llmserve.engine.block_pool import BlockPool, slots_for


def test_fresh_pool_hands_out_neighbours() -> None:
    pool = BlockPool(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    assert pool.num_free == 3


def test_freed_blocks_are_handed_out_again() -> None:
    pool = BlockPool(4)
    first = pool.allocate(4)
    pool.free(first)
    assert sorted(pool.allocate(4)) == first


def test_freeing_twice_is_caught() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks[:1])


def test_allocating_more_than_free_is_caught() -> None:
    with pytest.raises(AssertionError, match="5 blocks asked"):
        BlockPool(4).allocate(5)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[0, 1], [1, 2]], "two places"),
        ([[0, 1], [3]], "free and in"),
        ([[0, 1]], "lost"),
    ],
)
def test_check_finds_a_broken_table(tables: list[list[int]], message: str) -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(AssertionError, match=message):
        pool.check(tables)


def test_random_operations_keep_every_block() -> None:
    rng = random.Random(0)
    pool = BlockPool(32)
    tables: list[list[int]] = []
    for _ in range(2_000):
        if tables and rng.random() < 0.5:
            pool.free(tables.pop(rng.randrange(len(tables))))
        else:
            tables.append(pool.allocate(rng.randint(0, pool.num_free)))
        pool.check(tables)


def test_slots_follow_the_block_table() -> None:
    assert slots_for([5, 2], 2, 7, 4) == [22, 23, 8, 9, 10]
