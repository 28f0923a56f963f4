"""The paged KV cache's bookkeeping: which physical blocks are free, held, or kept for later.

Only ids are kept here; the memory behind them is the runner's. A sequence of L tokens holds
ceil(L / block_size) blocks, so it wastes less than one (Kwon et al. 2023, arXiv:2309.06180,
section 4). A block whose content is known by a key ("sealed") outlives its holders: it stays idle
until somebody asks for the same content, or until its memory is needed, least recently used first.

    free ──allocate──▶ held ──free──▶ free            (unsealed)
                        │ ▲───share───┐
                        └────free────▶ idle ──evict──▶ held by another     (sealed)
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool"]


class BlockPool:
    """Physical KV blocks by id. Every block is free, idle (sealed, unheld) or held, never two."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # In ascending order as long as blocks are free and not idle: a sequence's blocks are then
        # neighbours in memory, and a runner may read them without gathering.
        self._free = deque(range(num_blocks))
        self._ref_counts = [0] * num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._keys_of: dict[int, list[bytes]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, idle ones included."""
        return len(self._free) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has checked `num_free`. O(count)."""
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        taken = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def share(self, block_id: int) -> None:
        """Hold a block that is sealed, with whoever holds it already. O(1)."""
        assert block_id in self._keys_of, f"block {block_id} is shared but not sealed"
        if not self._ref_counts[block_id]:
            del self._idle[block_id]
        self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Give up one hold on each; the last of them are the first to be evicted. O(count)."""
        unsealed = []
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            left = self._ref_counts[block_id]
            assert left >= 0, f"block {block_id} is freed twice"
            if left:
                continue
            if block_id in self._keys_of:
                self._idle[block_id] = None
            else:
                unsealed.append(block_id)
        self._free.extend(reversed(unsealed))

    def seal(self, block_id: int, key: bytes) -> None:
        """Let a held block be found by `key`; where another block has it already, that one stays.

        A block may have several keys: that of a prompt's end within it, and its own when full.
        """
        assert self._ref_counts[block_id], f"block {block_id} is sealed but not held"
        if self._block_of.setdefault(key, block_id) == block_id:
            keys = self._keys_of.setdefault(block_id, [])
            if key not in keys:
                keys.append(key)

    def find(self, key: bytes) -> int | None:
        """The block with that content, if there is one."""
        return self._block_of.get(key)

    def is_held(self, block_id: int) -> bool:
        """Whether any sequence holds the block."""
        return self._ref_counts[block_id] > 0

    def idle_blocks(self) -> list[int]:
        """Sealed blocks that nobody holds."""
        return list(self._idle)

    def unseal(self, block_id: int) -> None:
        """Forget what a block holds, because it does not hold it after all."""
        for key in self._keys_of.pop(block_id, ()):
            del self._block_of[key]
        if block_id in self._idle:
            del self._idle[block_id]
            self._free.append(block_id)

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        for key in self._keys_of.pop(block_id):
            del self._block_of[key]
        return block_id

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless `tables` hold exactly the blocks counted as held."""
        held = Counter(block_id for table in tables for block_id in table)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert free.isdisjoint(idle), "a block is free and idle"
        assert held.keys().isdisjoint(free | idle), "a block is free or idle, and in a block table"
        assert len(free) + len(idle) + len(held) == self.num_blocks, "a block is lost"
        for block_id, count in held.items():
            refs = self._ref_counts[block_id]
            assert refs == count, f"block {block_id} has {refs} references, {count} tables hold it"
        for block_id in free | idle:
            assert self._ref_counts[block_id] == 0, f"block {block_id} is unheld, but referenced"
        assert free.isdisjoint(self._keys_of), "a free block is sealed"
        assert idle <= self._keys_of.keys(), "an idle block is not sealed"
        keys = {key: block_id for block_id, keys in self._keys_of.items() for key in keys}
        assert keys == self._block_of, "keys and blocks disagree"
