"""Arrays of ids in several files, read as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ShardedIds"]

Ids = npt.NDArray[np.unsignedinteger[Any]]


class ShardedIds:
    """Mapped shards under one count. A slice reads what it covers, from one shard or from two."""

    def __init__(self, shards: Sequence[Ids]) -> None:
        """At least one shard, none empty, all of one type."""
        self._shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice) -> Ids:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError("ids are read in steps of 1")
        parts = [self._shards[0][:0]]
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            shard, end = self._shards[number], int(self._ends[number])
            offset = start - (end - len(shard))
            parts.append(shard[offset : offset + min(stop, end) - start])
            start = end
        return np.concatenate(parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """All ids in memory. Raises `ValueError` where a copy is forbidden: it takes one."""
        if copy is False:
            raise ValueError("ids in several shards are no array without a copy")
        return np.concatenate(self._shards).astype(dtype or self._shards[0].dtype, copy=False)
