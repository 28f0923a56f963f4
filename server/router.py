"""Which replica gets a request: the one that has most of its prompt's beginning, unless it is busy.

The prefix cache of each replica is its own, so equal beginnings belong together. What a replica has
seen is remembered by block, as far back as its cache reaches; the guess may be wrong, which costs
time and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from llmserve.engine.config import EngineConfig
from llmserve.engine.request import Request

from .engine_client import EngineClient
from .live_requests import LiveRequest

__all__ = ["Place", "Route", "Router"]

MAX_EXCESS = 0.25
"""A replica with the prefix is passed over when it has more requests than another, by more than
this share of a step's most sequences."""


class Place(Protocol):
    """What is chosen among: a place for an engine."""

    index: int
    engine: EngineClient | None

    @property
    def live(self) -> list[LiveRequest]:
        """Requests that were routed here."""


class Route(NamedTuple):
    """What was chosen for a request."""

    place: int
    """Its index."""
    num_known: int
    """Full blocks of the prompt that were seen there before; not counted where there is but one
    place and nobody asked for it."""


class Router:
    """Chooses among replicas, and remembers what it chose."""

    def __init__(
        self, replicas: Sequence[Place], config: EngineConfig, *, counts_known: bool = False
    ) -> None:
        """`config` is that of each replica; `counts_known` asks for `Route.num_known` always."""
        self._replicas = replicas
        self._counts_known = counts_known
        self._block_size = config.block_size
        self._max_blocks = max(config.num_blocks)
        self._max_excess = max(1, int(MAX_EXCESS * config.max_num_seqs))
        self._seen: list[OrderedDict[int, None]] = [OrderedDict() for _ in replicas]

    def choose(self, request: Request) -> Route:
        """The replica for a request. O(prompt + live requests)."""
        if len(self._replicas) == 1 and not self._counts_known:
            return Route(0, 0)
        keys = list(self._keys(request))
        loads = [len(replica.live) for replica in self._replicas]
        running = [replica.index for replica in self._replicas if replica.engine is not None]
        candidates = running or range(len(self._replicas))
        most = min(loads[index] for index in candidates) + self._max_excess
        chosen = max(
            (index for index in candidates if loads[index] <= most),
            key=lambda index: (self._num_seen(index, keys), -loads[index]),
        )
        num_known = self._num_seen(chosen, keys)
        self._remember(chosen, keys)
        return Route(chosen, num_known)

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
