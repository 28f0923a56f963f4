"""How much of the training text stands in it more than once, in tokens.

A model that reads the same passage again and again learns it by heart before it learns the rest.
Pieces of 32 tokens are hashed at every offset; about one in sixteen is looked at, chosen by its
hash, so that two copies are chosen alike wherever they stand. Linear in the text, of which the
first 16 million tokens are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .batches import TokenIds

__all__ = ["repeated_share"]

PIECE_TOKENS = 32
"""Tokens of a piece."""
_MAX_TOKENS = 1 << 24
_PIECES_AT_ONCE = 1 << 16
_CHOSEN_BITS = 4
_BASE = 0x9E3779B97F4A7C15  # odd, and its bits look random: 2**64 over the golden ratio


def repeated_share(ids: TokenIds) -> float:
    """Share of the pieces of 32 tokens that occur earlier in the text already, 0..1."""
    count = max(0, min(len(ids), _MAX_TOKENS) - PIECE_TOKENS + 1)
    parts = [_chosen_hashes(ids, start, count) for start in range(0, count, _PIECES_AT_ONCE)]
    chosen = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
    return 1 - len(np.unique(chosen)) / len(chosen) if len(chosen) else 0.0


def _chosen_hashes(ids: TokenIds, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Those of the pieces that begin at `start` and behind it, of `count` in all."""
    end = min(start + _PIECES_AT_ONCE, count)
    hashes = _piece_hashes(np.asarray(ids[start : end + PIECE_TOKENS - 1]))
    chosen: npt.NDArray[np.uint64] = hashes[hashes >> np.uint64(64 - _CHOSEN_BITS) == 0]
    return chosen


def _piece_hashes(ids: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.uint64]:
    """A hash of the piece that begins at each token, mixed so that its upper bits are good."""
    count = len(ids) - PIECE_TOKENS + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(PIECE_TOKENS):
        hashes = hashes * np.uint64(_BASE) + ids[offset : offset + count].astype(np.uint64) + 1
    hashes ^= hashes >> np.uint64(29)
    return hashes * np.uint64(_BASE)
