"""The pool of KV blocks."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from llmserve.engine.block_pool import BlockPool


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


def test_sealed_block_is_found_while_held_and_after() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1)
    pool.seal(block, b"k")
    assert pool.find(b"k") == block
    pool.free([block])
    assert pool.find(b"k") == block
    assert pool.num_free == 4
    pool.share(block)
    assert pool.num_free == 3
    pool.check([[block]])


def test_shared_block_is_free_when_the_last_holder_gives_it_up() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.seal(block, b"k")
    pool.share(block)
    pool.free([block])
    assert pool.num_free == 1
    pool.check([[block]])
    pool.free([block])
    assert pool.num_free == 2


def test_unsealed_blocks_are_taken_first_and_then_the_least_recently_used() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.seal(block, bytes([block]))
    pool.free([blocks[1]])
    pool.free([blocks[0]])
    pool.free([blocks[2]])
    pool.share(blocks[1])  # a hit makes it the most recently used
    pool.free([blocks[1]])
    assert pool.allocate(4) == [3, blocks[0], blocks[2], blocks[1]]
    assert all(pool.find(bytes([block])) is None for block in blocks)


def test_end_of_a_table_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.seal(block, bytes([block]))
    pool.free(blocks)
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert pool.find(bytes([blocks[0]])) == blocks[0]


def test_first_block_with_a_key_stays_the_one_found() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.seal(first, b"k")
    pool.seal(second, b"k")
    assert pool.find(b"k") == first
    pool.free([second])
    pool.check([[first]])
    assert pool.allocate(1) == [second]  # unsealed, so it was free at once
    assert pool.find(b"k") == first


def test_block_with_two_keys_loses_both_at_once() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.seal(block, b"part")
    pool.seal(block, b"whole")
    pool.free([block])
    assert pool.find(b"part") == pool.find(b"whole") == block
    pool.allocate(1)
    assert pool.find(b"part") is None
    assert pool.find(b"whole") is None


@pytest.mark.parametrize("is_held", [True, False])
def test_unsealed_content_is_never_found_again(is_held: bool) -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.seal(block, b"k")
    if not is_held:
        pool.free([block])
    pool.unseal(block)
    assert pool.find(b"k") is None
    pool.check([[block]] if is_held else [])
    assert pool.num_free == (1 if is_held else 2)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[0, 1], [1, 2]], "has 1 references, 2 tables"),
        ([[0, 1], [3]], "free or idle, and in"),
        ([[0, 1]], "lost"),
    ],
)
def test_check_finds_a_broken_table(tables: list[list[int]], message: str) -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(AssertionError, match=message):
        pool.check(tables)


def test_random_operations_keep_every_block_and_every_content() -> None:
    """Against a model that keeps, for each sealed block, what was last put into it."""
    rng = random.Random(0)
    pool = BlockPool(24)
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}
    for turn in range(4_000):
        action = rng.random()
        if tables and action < 0.4:
            pool.free(tables.pop(rng.randrange(len(tables))))
        elif action < 0.6:
            taken = pool.allocate(rng.randint(0, min(6, pool.num_free)))
            for block in taken:
                content.pop(block, None)
            tables.append(taken)
        elif action < 0.8 and tables and any(tables):
            block = rng.choice([block for table in tables for block in table])
            key = b"%d" % rng.randrange(200)
            if pool.find(key) is None and block not in content:
                pool.seal(block, key)
                content[block] = key
        else:
            key = b"%d" % rng.randrange(200)
            found = pool.find(key)
            if found is not None:
                assert content[found] == key
                pool.share(found)
                tables.append([found])
        if turn % 7 == 0:
            pool.check(tables)
    assert Counter(map(len, tables))
