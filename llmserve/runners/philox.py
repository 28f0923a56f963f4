"""Random numbers without state: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3", section 3).

A draw depends on its key and counter alone, so a request's tokens do not depend on its
neighbours, on chunking or on a restart. docs/sampling.md holds the layout and a test vector.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["RANDOM_BITS", "philox4x32", "random_number", "random_numbers"]

RANDOM_BITS = 53
"""Bits of one draw."""

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Four 32-bit words from a counter of four and a key of two, in ten rounds."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * x0, _M1 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & _MASK, (p0 >> 32) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return x0, x1, x2, x3


def random_number(seed: int, choice_index: int, position: int) -> int:
    """The number in 0..2**53-1 that draws the token at `position` of one choice.

    The key is `seed` (64 bits); the counter holds `position` (64 bits) and `choice_index`.
    """
    words = philox4x32(
        (position & _MASK, position >> 32, choice_index, 0), (seed & _MASK, seed >> 32)
    )
    return (words[0] << 21) | (words[1] >> 11)


def random_numbers(
    seeds: npt.ArrayLike, choice_indices: npt.ArrayLike, positions: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """`random_number` of many rows at once, [R]: ten rounds over whole arrays."""
    mask, half = np.uint64(_MASK), np.uint64(32)
    seed, position = np.asarray(seeds, np.uint64), np.asarray(positions, np.uint64)
    k0, k1 = seed & mask, seed >> half
    x0, x1 = position & mask, position >> half
    x2, x3 = np.asarray(choice_indices, np.uint64), np.zeros_like(position)
    for _ in range(10):
        p0, p1 = np.uint64(_M0) * x0, np.uint64(_M1) * x2  # of 32 bits each: they fit into 64
        x0, x1, x2, x3 = (p1 >> half) ^ x1 ^ k0, p1 & mask, (p0 >> half) ^ x3 ^ k1, p0 & mask
        k0, k1 = (k0 + np.uint64(_W0)) & mask, (k1 + np.uint64(_W1)) & mask
    return ((x0 << np.uint64(21)) | (x1 >> np.uint64(11))).astype(np.int64)
