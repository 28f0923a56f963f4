"""Attention whose bits depend on nothing but the token's own context (decision 6).

Each token of a tile attends on its own, over its context gathered from the cache and padded to a
length that follows from its position and window alone. Tokens of equal padded length go through
the kernel together: it computes every row of a batch apart, by operations that depend on the
row's shape and on where its arrays begin. Therefore

- rows of queries are laid out so that each begins at a multiple of 64 bytes, as gathered keys and
  values do: float32 products of the CPU's library differ with the alignment of their arguments;
- attention runs on one thread: the kernel's work areas of other threads are aligned otherwise.

Shapes: R rows of a tile, T of them tokens, B tokens attended to together, L padded length, H query
heads, KV key heads, G = H / KV, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.scores import Scores
from .protocol import Batch, IntArray
from .torch_cache import PagedCache

__all__ = ["TokenAttention", "padded_length"]

_SHORTEST = 32
"""Places read for the shortest context. A multiple of it keeps gathered rows aligned."""
_MOST_PLACES = 16384
"""Places gathered at once, so that a tile far into a long context takes no more memory."""
_WRITTEN_OUT_ROWS = 32
"""Multiple of queries where attention is written out (`Scores`): each matrix of a batch is then
whole cache lines in a row, whatever D is."""
_ALIGNMENT = 64
"""Bytes: a cache line, the widest vector of a CPU."""


def padded_length(length: int) -> int:
    """Places read for a context of `length`: at most a quarter more, from 128 on."""
    step = max(_SHORTEST, (1 << (length.bit_length() - 1)) // 4)
    return -(-length // step) * step


@dataclass(slots=True)
class _Alike:
    """Tokens of a tile with the same padded length."""

    rows: Tensor  # [B] their rows in the tile
    slots: Tensor  # [B * L]
    mask: Tensor  # [B, 1, 1, L] added to the scores


class TokenAttention:
    """`Attend` for one tile: `tokens` are the packed indices of its first rows' tokens.

    A token sees what the cache holds before it, so tokens must come by ascending position.
    """

    def __init__(self, batch: Batch, cache: PagedCache, scores: Scores, tokens: IntArray) -> None:
        self._cache, self._scores, self._count = cache, scores, len(tokens)
        sequences = np.searchsorted(batch.cu_seqlens, tokens, side="right") - 1
        self._new_slots = [cache.tensor(group.slot_mapping[tokens]) for group in batch.groups]
        self._parts = [
            list(_plan(cache, index, group.block_tables[sequences], batch.positions[tokens]))
            for index, group in enumerate(batch.groups)
        ]

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write `k`, `v` [R, KV, D]; return the attention of `q` [R, H, D], padding rows zero."""
        group = self._cache.group_of[layer_index]
        new_k, new_v = k[: self._count], v[: self._count]
        self._cache.write(layer_index, self._new_slots[group], new_k, new_v)
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        aligned = _aligned_rows(q)
        with _one_thread():
            for part in self._parts[group]:
                keys, values = self._cache.read(layer_index, part.slots)
                attended = _attend(self._scores, part, aligned, q.shape, keys, values)
                out.index_copy_(0, part.rows, attended)
        return out


def _plan(cache: PagedCache, group: int, tables: IntArray, positions: IntArray) -> Iterator[_Alike]:
    """The tokens at `positions`, each with the block table of its sequence, by padded length."""
    window = cache.groups[group].window
    ends = positions + 1
    firsts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    # What is read begins where a block does: a function of the position too.
    lengths = ends - (firsts - firsts % cache.block_size)
    padded = np.array([padded_length(length) for length in lengths.tolist()])
    for width in np.unique(padded).tolist():
        alike = np.flatnonzero(padded == width)
        together = max(1, _MOST_PLACES // width)
        for start in range(0, len(alike), together):
            rows = alike[start : start + together]
            slots, is_outside = cache.places(group, tables[rows], firsts[rows], ends[rows], width)
            yield _Alike(
                rows=cache.tensor(rows),
                slots=cache.tensor(slots.reshape(-1)),
                mask=cache.mask(is_outside)[:, None, None, :],
            )


def _attend(
    scores: Scores, part: _Alike, aligned: Tensor, shape: torch.Size, keys: Tensor, values: Tensor
) -> Tensor:
    """The rows of `part` among `aligned` [R, at least H * D] → [B, H, D].

    `keys` and `values` [B * L, KV, D] are what was read for them.
    """
    count = len(part.rows)
    _, num_heads, head_dim = shape
    gathered = (count, -1, keys.shape[1], head_dim)
    k = keys.view(gathered).transpose(1, 2)  # [B, KV, L, D]
    v = values.view(gathered).transpose(1, 2)
    rows = aligned.index_select(0, part.rows)[:, : num_heads * head_dim]
    q = rows.view(count, k.shape[1], -1, head_dim)  # [B, KV, G, D]
    num_queries = q.shape[2]
    if scores.cap is not None:
        q = F.pad(q, (0, 0, 0, -num_queries % _WRITTEN_OUT_ROWS))
    out = scores.attend(q, k, v, mask=part.mask)[:, :, :num_queries]
    return out.reshape(count, num_heads, head_dim)


def _aligned_rows(q: Tensor) -> Tensor:
    """q [R, H, D] as rows [R, H * D or more], each of whole cache lines."""
    flat = q.flatten(1)
    return F.pad(flat, (0, -flat.shape[1] % (_ALIGNMENT // flat.itemsize)))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
