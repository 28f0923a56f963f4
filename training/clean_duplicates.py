"""Documents that are the same, or nearly: which come again, so that one of them is enough.

Near-duplicates are those whose sets of 16-character runs are alike: Jaccard similarity 0.8 or more,
computed exactly for every pair that MinHash brings together (Broder, On the resemblance and
containment of documents, 1997). 120 hashes in 24 bands of 5 miss a pair of similarity 0.8 once in
14,000 and one of 0.9 once in 10^9 (1 - (1 - s^5)^24). Characters, not words: not every language
parts its words.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["exact_duplicates", "jaccard", "near_duplicates", "shingle_hashes"]

MIN_SIMILARITY = 0.8
"""Jaccard similarity from which two documents count as one."""
SHINGLE_CHARS = 16
BANDS = 24
ROWS = 5

_SEED = 20260101
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses nothing
_BLOCK = 1 << 14
"""Shingles hashed at a time: what 120 rows of them take stays in the cache."""

UInt64Array = npt.NDArray[np.uint64]


def exact_duplicates(documents: Sequence[str]) -> set[int]:
    """Indices of documents that stood before, spaces and line breaks aside."""
    seen: set[bytes] = set()
    duplicates = set()
    for index, document in enumerate(documents):
        digest = hashlib.sha256(" ".join(document.split()).encode()).digest()
        if digest in seen:
            duplicates.add(index)
        seen.add(digest)
    return duplicates


def near_duplicates(documents: Sequence[str]) -> set[int]:
    """Indices of documents that are nearly one before them that is kept. Seeded: always the same.

    A document of fewer than 16 letters and digits is none. O(characters), and O(documents) of
    memory where few are alike.
    """
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    duplicates = set()
    for index, document in enumerate(documents):
        shingles = shingle_hashes(document)
        if not len(shingles):
            continue
        keys = _band_keys(_signature(shingles))
        candidates = {other for key in keys for other in buckets.get(key, ())}
        if any(_are_alike(shingles, documents[other]) for other in sorted(candidates)):
            duplicates.add(index)
            continue
        for key in keys:
            buckets[key].append(index)
    return duplicates


def shingle_hashes(document: str) -> UInt64Array:
    """Sorted hashes of all runs of 16 letters and digits, case and what is between them aside."""
    plain = "".join(filter(str.isalnum, document.casefold()))
    codes = np.frombuffer(plain.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - SHINGLE_CHARS + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_CHARS):
        hashes = hashes * _MULTIPLIER + codes[offset : offset + count]
    return np.unique(_mixed(hashes))


def jaccard(first: UInt64Array, second: UInt64Array) -> float:
    """Shared elements among all of two sorted sets, 0..1; 0 for two empty ones."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)


def _are_alike(shingles: UInt64Array, other: str) -> bool:
    return jaccard(shingles, shingle_hashes(other)) >= MIN_SIMILARITY


def _signature(shingles: UInt64Array) -> UInt64Array:
    """[BANDS * ROWS] smallest values of the shingles under as many hash functions."""
    factors, offsets = _hash_functions()
    smallest = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        block = shingles[start : start + _BLOCK]
        values = block[None, :] * factors[:, None] + offsets[:, None]  # modulo 2^64
        np.minimum(smallest, (values >> np.uint64(1)).min(axis=1), out=smallest)
    return smallest


def _hash_functions() -> tuple[UInt64Array, UInt64Array]:
    random = np.random.Generator(np.random.Philox(key=_SEED))
    factors, offsets = random.integers(0, 1 << 64, (2, BANDS * ROWS), dtype=np.uint64)
    return factors | np.uint64(1), offsets


def _band_keys(signature: UInt64Array) -> list[tuple[int, bytes]]:
    return [(band, row.tobytes()) for band, row in enumerate(signature.reshape(BANDS, ROWS))]


def _mixed(hashes: UInt64Array) -> UInt64Array:
    """Every bit of the result depends on every bit (the finalizer of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))
