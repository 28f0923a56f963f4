"""Who holds which KV blocks: block tables by row, prefix hits, window release, copies.

Layers with the same window form a group with a pool and tables of its own (`CacheGroup`). A group
without a window holds every block of a running sequence; one with a window gives back the blocks
that no later query can see. A block that several sequences hold is never written by one of them
where another reads: who is to write into a shared tail gets a copy first.

    table of a row, group with a window:   0 0 0 | 17 4 9 |
                                  released ------┘        └ num_blocks
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..runners.protocol import CacheGroup, GroupTables, IntArray
from .block_pool import BlockPool
from .config import EngineConfig
from .sequence import Sequence
from .sizing import blocks_of_one, check_pools

__all__ = ["GroupCache", "KVCache", "PrefixHit"]

_NO_COPIES: IntArray = np.empty((0, 2), dtype=np.int64)


@dataclass(slots=True)
class PrefixHit:
    """What the prefix cache holds of a sequence's beginning."""

    num_blocks: int = 0
    """Blocks found, a partial last one of the prompt included."""
    num_tokens: int = 0
    """Tokens that need not be computed: at least one is left."""
    is_too_fresh: bool = False
    """Whether the last block must be copied, but is being written in this very step."""


class GroupCache:
    """Pool and block tables of one cache group."""

    def __init__(self, group: CacheGroup, num_blocks: int, config: EngineConfig) -> None:
        self.window = group.window
        self.pool = BlockPool(num_blocks)
        self._block_size = config.block_size
        width = -(-config.max_seq_len // config.block_size)
        self.tables: IntArray = np.zeros((config.max_num_seqs, width), dtype=np.int64)
        """[rows, blocks]; places before `num_released` and from `num_blocks` on hold 0."""
        self.num_blocks: IntArray = np.zeros(config.max_num_seqs, dtype=np.int64)
        """Places of each row's table in use, released ones included."""
        self.num_released: IntArray = np.zeros(config.max_num_seqs, dtype=np.int64)
        """Blocks given back at each row's beginning."""
        self.copies: list[tuple[int, int]] = []
        """(from, to) of the step that is being scheduled."""
        self.most_held = blocks_of_one(
            group,
            max_seq_len=config.max_seq_len,
            block_size=config.block_size,
            # With many sequences a chunk may have a token for each of them.
            max_batched_tokens=max(config.most_tokens, config.max_num_seqs),
        )
        """Blocks that one sequence holds at most."""

    def first_visible(self, position: int) -> int:
        """First block that a query at `position`, or any later one, can see."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self._block_size

    def lacking(self, rows: IntArray, num_tokens: IntArray) -> IntArray:
        """Those of `rows` whose blocks do not hold `num_tokens`."""
        lacking: IntArray = rows[num_tokens > self.num_blocks[rows] * self._block_size]
        return lacking

    def grow_by_one(self, rows: IntArray) -> None:
        """Give each of `rows` one more block."""
        if len(rows):
            self.tables[rows, self.num_blocks[rows]] = self.pool.allocate(len(rows))
            self.num_blocks[rows] += 1

    def grow(self, row: int, num_tokens: int) -> None:
        """Give `row` the blocks it lacks to hold `num_tokens`; the caller has checked the pool."""
        start, stop = int(self.num_blocks[row]), -(-num_tokens // self._block_size)
        if stop > start:
            self.tables[row, start:stop] = self.pool.allocate(stop - start)
            self.num_blocks[row] = stop

    def held(self, row: int) -> list[int]:
        """Blocks of a row, in order of position, released ones left out."""
        blocks: list[int] = self.tables[row, self.num_released[row] : self.num_blocks[row]].tolist()
        return blocks

    def release_before(self, row: int, position: int) -> None:
        """Give back the blocks that no query at or after `position` sees."""
        start, stop = int(self.num_released[row]), self.first_visible(position)
        if stop > start:
            self.pool.free(self.tables[row, start:stop].tolist())
            self.tables[row, start:stop] = 0
            self.num_released[row] = stop

    def trim(self, row: int, num_tokens: int) -> None:
        """Give back the blocks beyond those that `num_tokens` need."""
        stop, end = -(-num_tokens // self._block_size), int(self.num_blocks[row])
        if end > stop:
            self.pool.free(self.tables[row, stop:end].tolist())
            self.tables[row, stop:end] = 0
            self.num_blocks[row] = stop

    def take_hit(self, row: int, keys: list[bytes], position: int) -> None:
        """Hold the sealed blocks of `keys` that a query at `position` can see."""
        first = self.first_visible(position)
        for index in range(first, len(keys)):
            block_id = self.pool.find(keys[index])
            assert block_id is not None, "a hit was lost before it was taken"
            self.pool.share(block_id)
            self.tables[row, index] = block_id
        self.num_released[row], self.num_blocks[row] = first, len(keys)

    def copy_tail(self, row: int) -> None:
        """Replace a row's last block by a copy of its own."""
        last = int(self.num_blocks[row]) - 1
        shared = int(self.tables[row, last])
        own = self.pool.allocate(1)[0]
        self.tables[row, last] = own
        self.copies.append((shared, own))
        self.pool.free([shared])

    def clear(self, row: int) -> None:
        """Give back everything that a row holds."""
        self.pool.free(self.held(row))
        self.tables[row, : self.num_blocks[row]] = 0
        self.num_blocks[row] = self.num_released[row] = 0

    def pack(self, rows: IntArray, slot_mapping: IntArray) -> GroupTables:
        """The group's share of a batch over `rows`."""
        width = max(self.num_blocks[rows].tolist(), default=0)
        return GroupTables(
            slot_mapping=slot_mapping,
            block_tables=self.tables[rows, :width],
            block_copies=np.array(self.copies, dtype=np.int64) if self.copies else _NO_COPIES,
        )


class KVCache:
    """All groups together, and the prefix cache over them."""

    def __init__(self, config: EngineConfig, groups: tuple[CacheGroup, ...]) -> None:
        """Raises `ConfigError` if a pool does not hold one sequence of full length."""
        check_pools(config, groups)
        self._block_size = config.block_size
        self.groups = [
            GroupCache(group, count, config)
            for group, count in zip(groups, config.num_blocks, strict=True)
        ]
        self._fresh: set[bytes] = set()  # keys sealed in the step that is being scheduled
        self._fresh_blocks: list[tuple[GroupCache, int]] = []

    def begin_step(self) -> None:
        """Forget the copies and seals of the step before: they are done."""
        self._fresh.clear()
        self._fresh_blocks.clear()
        for group in self.groups:
            group.copies = []

    def find_prefix(self, sequence: Sequence) -> PrefixHit:
        """The longest beginning of a waiting sequence that every group holds. O(blocks)."""
        if not sequence.takes_hits:
            return PrefixHit()
        num_tokens = len(sequence.token_ids)
        count = num_tokens // self._block_size
        keys = sequence.block_keys.full(count)[:count]
        end = sequence.block_keys.prompt_end() if num_tokens == sequence.num_prompt_tokens else None
        if end is not None:
            keys.append(end)
        best = self.longest(keys, num_tokens)
        hit = min(num_tokens - 1, best * self._block_size)
        needs_copy = hit < min(num_tokens, best * self._block_size)
        return PrefixHit(best, hit, is_too_fresh=needs_copy and keys[best - 1] in self._fresh)

    def longest(self, keys: list[bytes], num_tokens: int) -> int:
        """Most blocks of `keys` such that each group has all that later queries see of them."""
        best = 0
        runs = [0] * len(self.groups)
        for index, key in enumerate(keys):
            position = min((index + 1) * self._block_size, num_tokens - 1)
            is_whole = True
            for place, group in enumerate(self.groups):
                runs[place] = runs[place] + 1 if group.pool.find(key) is not None else 0
                if not runs[place] and group.window is None:
                    return best
                is_whole &= runs[place] >= index + 1 - group.first_visible(position)
            if is_whole:
                best = index + 1
        return best

    def has_room(self, sequence: Sequence, hit: PrefixHit, *, reserve: int) -> bool:
        """Whether a waiting sequence can be admitted with `reserve` blocks left over."""
        total = -(-len(sequence.token_ids) // self._block_size)
        keys = self._hit_keys(sequence, hit)
        has_copy = hit.num_tokens < min(len(sequence.token_ids), hit.num_blocks * self._block_size)
        for group in self.groups:
            first = group.first_visible(hit.num_tokens)
            found = [group.pool.find(key) for key in keys[first:]]
            num_idle = sum(block is not None and not group.pool.is_held(block) for block in found)
            wanted = min(total - hit.num_blocks, group.most_held) + has_copy + num_idle
            if group.pool.num_free < wanted + reserve:
                return False
        return True

    def admit(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Fill the table of a sequence that just got its row. `has_room` has been asked."""
        row, num_tokens = sequence.row, len(sequence.token_ids)
        keys = self._hit_keys(sequence, hit)
        for group in self.groups:
            group.take_hit(row, keys, hit.num_tokens)
            if hit.num_tokens < min(num_tokens, hit.num_blocks * self._block_size):
                group.copy_tail(row)
            if group.window is None:
                group.grow(row, num_tokens)
        sequence.num_sealed_blocks = hit.num_tokens // self._block_size

    def _hit_keys(self, sequence: Sequence, hit: PrefixHit) -> list[bytes]:
        num_full = min(hit.num_blocks, len(sequence.token_ids) // self._block_size)
        keys = sequence.block_keys.full(num_full)[:num_full]
        if hit.num_blocks > num_full:
            end = sequence.block_keys.prompt_end()
            assert end is not None, "a prompt's end was hit where there is none"
            keys.append(end)
        return keys

    def most_tokens(self, row: int) -> int:
        """Tokens that `row` can hold if it gets every free block."""
        return min(
            (int(group.num_blocks[row]) + group.pool.num_free) * self._block_size
            for group in self.groups
        )

    def extend(self, rows: IntArray, num_tokens: IntArray) -> bool:
        """Give rows that decode the block that their next token needs, if it needs one.

        False, and nothing is given, where a pool has too few.
        """
        lacking = [group.lacking(rows, num_tokens) for group in self.groups]
        for group, short in zip(self.groups, lacking, strict=True):
            if len(short) > group.pool.num_free:
                return False
        for group, short in zip(self.groups, lacking, strict=True):
            group.grow_by_one(short)
        return True

    def grow(self, row: int, num_tokens: int) -> None:
        """Give one row what it needs to hold `num_tokens`; `most_tokens` has been asked."""
        for group in self.groups:
            group.grow(row, num_tokens)

    def release_windows(self, rows: IntArray, lengths: IntArray) -> None:
        """Give back what nobody sees: the next query of each row is its `lengths`-th token."""
        for group in self.groups:
            if group.window is None:
                continue
            first = np.maximum(lengths - group.window, 0) // self._block_size
            for index in np.flatnonzero(first > group.num_released[rows]).tolist():
                group.release_before(int(rows[index]), int(lengths[index]) - 1)

    def seal(self, sequence: Sequence, num_computed: int) -> None:
        """Let the blocks that `num_computed` tokens fill be found by others."""
        count = num_computed // self._block_size
        if count > sequence.num_sealed_blocks:
            keys = sequence.block_keys.full(count)
            for index in range(sequence.num_sealed_blocks, count):
                self._seal(sequence.row, index, keys[index])
            sequence.num_sealed_blocks = count
        end = sequence.num_prompt_tokens
        if num_computed == end and len(sequence.token_ids) == end:
            key = sequence.block_keys.prompt_end()
            if key is not None:
                self._seal(sequence.row, end // self._block_size, key)

    def _seal(self, row: int, index: int, key: bytes) -> None:
        for group in self.groups:
            if index >= group.num_released[row] and group.pool.find(key) is None:
                block_id = int(group.tables[row, index])
                group.pool.seal(block_id, key)
                self._fresh.add(key)
                self._fresh_blocks.append((group, block_id))

    def distrust_step(self) -> None:
        """Unseal what the step under way was to compute, since it failed."""
        for group, block_id in self._fresh_blocks:
            group.pool.unseal(block_id)
        self.begin_step()

    def distrust(self, sequence: Sequence) -> None:
        """Unseal every block that a sequence holds: what is in it may not be sound.

        Blocks that it only found, too: the fault may lie in one, and nobody is to find it again.
        """
        for group in self.groups:
            for block_id in group.held(sequence.row):
                group.pool.unseal(block_id)

    def trim(self, row: int, num_tokens: int) -> None:
        """Give back blocks beyond those that `num_tokens` need."""
        for group in self.groups:
            group.trim(row, num_tokens)

    def clear(self, row: int) -> None:
        """Give back everything that a row holds."""
        for group in self.groups:
            group.clear(row)

    def check(self, rows: dict[int, int]) -> None:
        """Raise AssertionError if blocks are lost, or a row holds more than its tokens need.

        `rows` maps each row in use to the tokens that it has computed.
        """
        for group in self.groups:
            group.pool.check([group.held(row) for row in rows])
            for row in range(len(group.num_blocks)):
                if row not in rows:
                    assert group.num_blocks[row] == 0, "a row without a sequence holds blocks"
            for row, num_computed in rows.items():
                assert num_computed <= group.num_blocks[row] * self._block_size
                assert group.num_released[row] <= group.first_visible(num_computed)
