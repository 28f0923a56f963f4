"""Which replica gets a request: the one that has most of its prompt's beginning, unless it is busy.

The prefix cache of each replica is its own, so equal beginnings belong together. What a replica has
seen is remembered by block, as far back as its cache reaches; the guess may be wrong, which costs
time and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from llmserve.engine.config import EngineConfig
from llmserve.engine.request import Request

from .replica import Replica

__all__ = ["Router"]

MAX_EXCESS = 0.25
"""A replica with the prefix is passed over when it has more requests than another, by more than
this share of a step's most sequences."""


class Router:
    """Chooses among replicas, and remembers what it chose."""

    def __init__(self, replicas: Sequence[Replica], config: EngineConfig) -> None:
        """`config` is that of each replica."""
        self._replicas = replicas
        self._block_size = config.block_size
        self._max_blocks = max(config.num_blocks)
        self._max_excess = max(1, int(MAX_EXCESS * config.max_num_seqs))
        self._seen: list[OrderedDict[int, None]] = [OrderedDict() for _ in replicas]

    def choose(self, request: Request) -> int:
        """The replica's index. O(prompt + live requests)."""
        if len(self._replicas) == 1:
            return 0
        keys = list(self._keys(request))
        loads = [len(replica.live) for replica in self._replicas]
        running = [replica.index for replica in self._replicas if replica.engine is not None]
        candidates = running or range(len(self._replicas))
        most = min(loads[index] for index in candidates) + self._max_excess
        chosen = max(
            (index for index in candidates if loads[index] <= most),
            key=lambda index: (self._num_seen(index, keys), -loads[index]),
        )
        self._remember(chosen, keys)
        return chosen

    def forget(self, index: int) -> None:
        """The replica's engine is a new one: its cache is empty."""
        self._seen[index].clear()

    def _keys(self, request: Request) -> Iterator[int]:
        """One for each full block of the prompt, which stands for all before it too."""
        key = hash((request.adapter, request.cache_salt))
        ids, size = request.prompt_token_ids, self._block_size
        for start in range(0, len(ids) - size + 1, size):
            key = hash((key, *ids[start : start + size]))
            yield key

    def _num_seen(self, index: int, keys: Sequence[int]) -> int:
        seen = self._seen[index]
        for count, key in enumerate(keys):
            if key not in seen:
                return count
        return len(keys)

    def _remember(self, index: int, keys: Sequence[int]) -> None:
        seen = self._seen[index]
        for key in keys:
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > self._max_blocks:
            seen.popitem(last=False)
