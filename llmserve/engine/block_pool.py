"""The paged KV cache's bookkeeping: which physical blocks are free, and who holds the others.

Only ids are kept here; the memory behind them is the runner's. A sequence of L tokens holds
ceil(L / block_size) blocks, so it wastes less than one (Kwon et al. 2023, arXiv:2309.06180,
section 4).
"""

from __future__ import annotations

__all__ = ["BlockPool", "slots_for"]


class BlockPool:
    """Physical KV blocks by id. Every block is free or held by exactly one sequence."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # Taken from the end: a fresh pool hands out ascending ids, so one sequence's blocks are
        # neighbours in memory and a runner may read them without gathering.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller has checked `num_free`. O(count)."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        if not count:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        for block_id in taken:
            self._is_held[block_id] = 1
        return taken

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back. O(len(block_ids))."""
        for block_id in reversed(block_ids):
            assert self._is_held[block_id], f"block {block_id} is freed twice"
            self._is_held[block_id] = 0
            self._free.append(block_id)

    def check(self, tables: list[list[int]]) -> None:
        """Raise AssertionError unless `tables` hold exactly the blocks that are not free."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        held = [block_id for table in tables for block_id in table]
        assert len(held) == len(set(held)), "a block is in two places of the block tables"
        assert free.isdisjoint(held), "a block is free and in a block table"
        assert len(free) + len(held) == self.num_blocks, "a block is lost"
        assert all(self._is_held[block_id] for block_id in held), "a held block is marked free"


def slots_for(block_table: list[int], first: int, last: int, block_size: int) -> list[int]:
    """Cache slots of positions `first`..`last - 1`: where their keys and values are written.

    A slot is `block_id * block_size + offset`, counted in tokens over the whole pool.
    """
    return [
        block_table[position // block_size] * block_size + position % block_size
        for position in range(first, last)
    ]
