"""Attention over the paged KV cache, in torch operations.

Keys and values lie in one pool per layer, addressed by slots. A step writes its new ones, then
reads, for every sequence, the slots of its context, or of what a sliding window shows of it:
gathered side by side for all sequences that decode, and one sequence at a time for prefill chunks.
A single decoding sequence whose slots are neighbours is read in place.

Shapes: T tokens in the step, B decoding sequences, L longest context among them, H query heads,
KV key heads, G = H / KV, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .protocol import Batch, GroupTables, IntArray

__all__ = ["PagedAttention", "PagedCache"]


class PagedCache:
    """Keys and values of every layer, `num_slots` tokens each, and one slot more that stays zero.

    One of these serves one cache group. Reads beyond a sequence's end are directed to that null
    slot: what other sequences left in the pool, NaN included, can never reach a result through a
    masked place.
    """

    def __init__(
        self, *, num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (num_slots + 1, num_kv_heads, head_dim)
        self.null_slot = num_slots
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        """[slots, KV, D] of each layer."""
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        """[slots, KV, D] of each layer."""
        # The same memory as one sequence of all slots, [1, KV, slots, D]: made once, since a view
        # costs as much as a small operation.
        self.whole_keys = [keys.transpose(0, 1)[None] for keys in self.keys]
        self.whole_values = [values.transpose(0, 1)[None] for values in self.values]

    def copy_blocks(self, copies: IntArray, block_size: int) -> None:
        """Copy whole blocks, (from, to) each; all are read before any is written."""
        offsets = np.arange(block_size)
        device = self.keys[0].device
        source, target = (
            torch.from_numpy((copies[:, side, None] * block_size + offsets).reshape(-1)).to(device)
            for side in (0, 1)
        )
        for slots in (*self.keys, *self.values):
            slots.index_copy_(0, target, slots.index_select(0, source))


@dataclass(slots=True)
class _Decodes:
    """The leading tokens of the step that are one sequence each."""

    count: int
    length: int
    slots: Tensor  # [B * L], shorter contexts padded with the null slot
    mask: Tensor | None  # [B, 1, 1, L] added to the scores; None when all are equally long


@dataclass(slots=True)
class _Run:
    """A step of one token whose sequence lies in one piece: slots `first`..`first + length - 1`."""

    first: int
    length: int


@dataclass(slots=True)
class _Chunk:
    """Several tokens of one sequence, `start`..`end` of the packed axis."""

    start: int
    end: int
    slots: Tensor  # [L]
    mask: Tensor | None  # [T, L] added to the scores; None for a chunk that begins the sequence


class PagedAttention:
    """Attention of one cache group in one step: called once for each of its layers, then dropped.

    `layer_index` counts within the group.
    """

    def __init__(
        self,
        batch: Batch,
        group: GroupTables,
        cache: PagedCache,
        *,
        block_size: int,
        window: int | None = None,
    ) -> None:
        self._cache = cache
        self._window = window
        keys = cache.keys[0]
        self._device, self._dtype = keys.device, keys.dtype
        self._tables = group.block_tables
        if len(group.block_copies):
            cache.copy_blocks(group.block_copies, block_size)
        self._run = self._find_run(batch, block_size)
        if self._run is not None:
            return
        self._new_slots = self._tensor(group.slot_mapping)
        lengths = np.diff(batch.cu_seqlens)
        others = np.flatnonzero(lengths != 1)
        num_decodes = int(others[0]) if len(others) else len(lengths)
        self._decodes = self._plan_decodes(batch, num_decodes, block_size) if num_decodes else None
        self._chunks = [
            self._plan_chunk(batch, index, block_size) for index in range(num_decodes, len(lengths))
        ]

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write `k`, `v` [T, KV, D]; return the attention of `q` [T, H, D] as [T, H, D]."""
        if self._run is not None:
            return self._attend_run(self._run, layer_index, q, k, v)
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        keys.index_copy_(0, self._new_slots, k)
        values.index_copy_(0, self._new_slots, v)
        if self._decodes is not None and not self._chunks:
            return _attend_decodes(self._decodes, q, keys, values)
        out = torch.empty_like(q)
        if self._decodes is not None:
            count = self._decodes.count
            out[:count] = _attend_decodes(self._decodes, q[:count], keys, values)
        for chunk in self._chunks:
            out[chunk.start : chunk.end] = _attend_chunk(
                chunk, q[chunk.start : chunk.end], keys, values
            )
        return out

    def _attend_run(self, run: _Run, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read the cache where it lies."""
        cache, last = self._cache, run.first + run.length - 1
        cache.keys[layer_index].narrow(0, last, 1).copy_(k)
        cache.values[layer_index].narrow(0, last, 1).copy_(v)
        keys = cache.whole_keys[layer_index].narrow(2, run.first, run.length)
        values = cache.whole_values[layer_index].narrow(2, run.first, run.length)
        grouped = q.view(1, keys.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values).view(q.shape)

    def _first_visible(self, lengths: IntArray) -> IntArray:
        """First position that the last of `lengths` tokens sees."""
        return (
            np.zeros_like(lengths)
            if self._window is None
            else np.maximum(lengths - self._window, 0)
        )

    def _plan_decodes(self, batch: Batch, count: int, block_size: int) -> _Decodes:
        firsts = self._first_visible(batch.context_lens[:count])
        lengths = batch.context_lens[:count] - firsts
        longest = int(lengths.max())
        positions = firsts[:, None] + np.arange(longest)  # [B, L]
        is_beyond = np.arange(longest) >= lengths[:, None]
        positions[is_beyond] = 0
        blocks = np.take_along_axis(self._tables[:count], positions // block_size, axis=1)
        slots = blocks * block_size + positions % block_size
        mask = None
        if is_beyond.any():
            slots[is_beyond] = self._cache.null_slot
            mask = self._mask(is_beyond)[:, None, None, :]
        return _Decodes(count, longest, self._tensor(slots.reshape(-1)), mask)

    def _plan_chunk(self, batch: Batch, index: int, block_size: int) -> _Chunk:
        start, end = int(batch.cu_seqlens[index]), int(batch.cu_seqlens[index + 1])
        length = int(batch.context_lens[index])
        first = length - (end - start)  # position of the chunk's first token
        lowest = 0 if self._window is None else max(0, first - self._window + 1)
        positions = np.arange(lowest, length)
        slots = self._tables[index, positions // block_size] * block_size
        slots = slots + positions % block_size
        mask = None
        if first or (self._window is not None and length > self._window):
            queries = np.arange(first, length)[:, None]
            is_hidden = positions > queries
            if self._window is not None:
                is_hidden |= positions <= queries - self._window
            mask = self._mask(is_hidden)
        return _Chunk(start, end, self._tensor(slots), mask)

    def _find_run(self, batch: Batch, block_size: int) -> _Run | None:
        """The single decoding sequence of a step, if what it sees lies in neighbouring blocks."""
        if batch.num_tokens != 1:
            return None
        length = int(batch.context_lens[0])
        first = int(self._first_visible(batch.context_lens[:1])[0])
        table = self._tables[0, first // block_size : -(-length // block_size)].tolist()
        if table != list(range(table[0], table[0] + len(table))):
            return None
        return _Run(table[0] * block_size + first % block_size, length - first)

    def _mask(self, is_hidden: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Tensor:
        hidden = torch.from_numpy(is_hidden).to(self._device)
        zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(hidden, float("-inf"))

    def _tensor(self, values: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


def _attend_decodes(plan: _Decodes, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    count, num_heads, head_dim = q.shape
    shape = (count, plan.length, -1, head_dim)
    k = keys.index_select(0, plan.slots).view(shape).transpose(1, 2)  # [B, KV, L, D]
    v = values.index_select(0, plan.slots).view(shape).transpose(1, 2)
    # The G query heads that share a key head stand as G queries of it.
    grouped = q.reshape(count, k.shape[1], -1, head_dim)  # [B, KV, G, D]
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=plan.mask)
    return out.reshape(count, num_heads, head_dim)


def _attend_chunk(chunk: _Chunk, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    k = keys.index_select(0, chunk.slots).transpose(0, 1)[None]  # [1, KV, L, D]
    v = values.index_select(0, chunk.slots).transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, H, T, D]
        k,
        v,
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return out[0].transpose(0, 1)
