"""Who holds which KV blocks at one moment: what a person who watches the cache wants to see.

A picture of a pool, made when somebody asks and not kept: the pools and tables themselves are in
`block_pool.py` and `kv_cache.py`. Blocks are listed by ascending id as runs of equal ones. Of a
pool with more than `MAX_CELLS` blocks, neighbours are told together, so that the picture of any
pool stays small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..runners.protocol import IntArray
from .block_pool import BlockPool

__all__ = ["FREE", "KEPT", "MAX_CELLS", "SHARED", "BlockMap", "draw_map"]

MAX_CELLS = 10_000
"""Most pieces that a pool is told in."""

FREE = 0
KEPT = 1
"""Nobody holds it at present; it is kept for who asks for the same."""
SHARED = 2
"""Several requests hold it."""

_FIRST_OWNER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMap:
    """One pool."""

    window: int | None
    """Tokens that its layers look back; None: all of them."""
    num_blocks: int
    blocks_per_cell: int
    """Neighbours that are told as one: as held if one of them is, else as kept if one is."""
    owners: list[str]
    """Ids of the requests that hold blocks, in the order in which they began to run."""
    runs: list[tuple[int, int]]
    """What, and of how many cells on end: `FREE`, `KEPT`, `SHARED`, or 3 + the owner's index."""


def draw_map(
    pool: BlockPool, tables: Iterable[tuple[str, list[int]]], window: int | None
) -> BlockMap:
    """The picture of `pool`, of which `tables` gives the holders. O(blocks).

    Blocks that several choices of one request hold are that request's own.
    """
    codes = np.full(pool.num_blocks, FREE, dtype=np.int64)
    codes[pool.idle_blocks()] = KEPT
    owners: dict[str, int] = {}
    for request_id, block_ids in tables:
        code = owners.setdefault(request_id, _FIRST_OWNER + len(owners))
        held = np.array(block_ids, dtype=np.int64)
        is_taken = (codes[held] > KEPT) & (codes[held] != code)
        codes[held] = np.where(is_taken, SHARED, code)
    size = -(-pool.num_blocks // MAX_CELLS)
    return BlockMap(
        window=window,
        num_blocks=pool.num_blocks,
        blocks_per_cell=size,
        owners=list(owners),
        runs=_runs(_cells(codes, size)),
    )


def _cells(codes: IntArray, size: int) -> IntArray:
    if size == 1:
        return codes
    padded = np.full(-(-len(codes) // size) * size, FREE, dtype=np.int64)
    padded[: len(codes)] = codes
    cells: IntArray = padded.reshape(-1, size).max(axis=1)
    return cells


def _runs(codes: IntArray) -> list[tuple[int, int]]:
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    lengths = np.diff(starts, append=len(codes))
    return list(zip(codes[starts].tolist(), lengths.tolist(), strict=True))
