"""Attention over the paged KV cache, in torch operations.

A step writes its new keys and values, then reads, for every sequence, the slots of its context, or
of what a sliding window shows of it. Sequences with equally few new tokens, decodes above all, are
gathered side by side; longer prefill chunks one at a time. A single decoding sequence whose slots
are neighbours is read in place.

Shapes: T tokens in the step, B sequences side by side, N new tokens of each, L places read for
each, H query heads, KV key heads, G = H / KV, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.scores import Scores
from .protocol import Batch, IntArray
from .torch_cache import PagedCache

__all__ = ["PagedAttention"]

_MOST_SIDE_BY_SIDE = 16
"""New tokens up to which sequences are read together: a token and its drafts. Longer chunks fill
the machine alone, and would pay for being padded to each other's contexts."""

_FREE_PADDING = 2048
"""Places read in vain that cost less than one more part: a few operations in each layer."""


class PagedAttention:
    """`Attend` for one step: built from its batch, called once per layer, then dropped."""

    def __init__(self, batch: Batch, cache: PagedCache, scores: Scores) -> None:
        self._group_of = cache.group_of
        is_in_place = batch.num_tokens == 1 and cache.form is None
        plan = _plan_single if is_in_place else _Reads
        self._plans = [plan(batch, cache, group, scores) for group in range(len(cache.groups))]

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write `k`, `v` [T, KV, D]; return the attention of `q` [T, H, D] as [T, H, D]."""
        return self._plans[self._group_of[layer_index]](layer_index, q, k, v)


@dataclass(slots=True)
class _Single:
    """A step of one token: what it sees, its own slot last."""

    cache: PagedCache
    scores: Scores
    new_slot: int
    first: int
    """Where its slots begin, if they are neighbours."""
    length: int
    slots: Tensor | None
    """[length] all of them, if they are not."""

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read the cache where it lies, or gather it."""
        cache = self.cache
        cache.keys[layer_index].narrow(0, self.new_slot, 1).copy_(k)
        cache.values[layer_index].narrow(0, self.new_slot, 1).copy_(v)
        keys, values = cache.whole_keys[layer_index], cache.whole_values[layer_index]
        if self.slots is None:
            keys = keys.narrow(2, self.first, self.length)
            values = values.narrow(2, self.first, self.length)
        else:
            keys = cache.keys[layer_index].index_select(0, self.slots).transpose(0, 1)[None]
            values = cache.values[layer_index].index_select(0, self.slots).transpose(0, 1)[None]
        grouped = q.view(1, keys.shape[1], -1, q.shape[-1])
        return self.scores.attend(grouped, keys, values).view(q.shape)


def _plan_single(batch: Batch, cache: PagedCache, group: int, scores: Scores) -> _Single:
    length, size = int(batch.context_lens[0]), cache.block_size
    window = cache.groups[group].window
    first = 0 if window is None else max(0, length - window)
    tables = batch.groups[group]
    table = tables.block_tables[0, first // size : -(-length // size)]
    blocks, slots = table.tolist(), None
    if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
        all_slots = (table[:, None] * size + np.arange(size)).reshape(-1)
        slots = cache.tensor(all_slots[first % size : first % size + length - first])
    return _Single(
        cache=cache,
        scores=scores,
        new_slot=int(tables.slot_mapping[0]),
        first=blocks[0] * size + first % size,
        length=length - first,
        slots=slots,
    )


@dataclass(slots=True)
class _Part:
    """Sequences with equally many new tokens, read side by side."""

    tokens: slice | Tensor  # their places in the packed axis, B * N
    count: int  # B
    slots: Tensor  # [B * L]
    mask: Tensor | None  # [B, 1, N, L] added to the scores; None: nothing read is hidden
    is_causal: bool  # whether the tokens are whole sequences, each seeing those before it


class _Reads:
    """One cache group of a step, in parts."""

    def __init__(self, batch: Batch, cache: PagedCache, group: int, scores: Scores) -> None:
        self._cache, self._group, self._scores = cache, group, scores
        self._new_slots = cache.tensor(batch.groups[group].slot_mapping)
        counts = np.diff(batch.cu_seqlens)
        window = cache.groups[group].window
        lengths = batch.context_lens
        seen = lengths if window is None else np.minimum(lengths, window)
        self._parts = [
            self._plan(batch, members, num_new) for members, num_new in _side_by_side(counts, seen)
        ]

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the step's keys and values, then attend part by part."""
        self._cache.write(layer_index, self._new_slots, k, v)
        if len(self._parts) == 1:  # all tokens, in their order
            return self._attend(layer_index, self._parts[0], q)
        out = torch.empty_like(q)
        for part in self._parts:
            out[part.tokens] = self._attend(layer_index, part, q[part.tokens])
        return out

    def _attend(self, layer_index: int, part: _Part, q: Tensor) -> Tensor:
        keys, values = self._cache.read(layer_index, part.slots)
        return _attend(self._scores, part, q, keys, values)

    def _plan(self, batch: Batch, members: IntArray, num_new: int) -> _Part:
        """What the sequences `members`, with `num_new` tokens each, read."""
        window = self._cache.groups[self._group].window
        ends = batch.context_lens[members]
        firsts = np.zeros_like(ends)
        if window is not None:  # what the first of the new tokens sees
            firsts = np.maximum(ends - num_new + 1 - window, 0)
        starts = firsts - firsts % self._cache.block_size
        tables = batch.groups[self._group].block_tables[members]
        width = int((ends - starts).max())
        slots, is_hidden = self._cache.places(self._group, tables, firsts, ends, width)
        is_causal = num_new > 1 and width == num_new == int(ends.min())
        is_causal &= window is None or num_new <= window
        if num_new > 1 and not is_causal:
            positions = (starts[:, None] + np.arange(width))[:, None, :]  # [B, 1, L]
            queries = (ends[:, None] - num_new + np.arange(num_new))[:, :, None]  # [B, N, 1]
            is_hidden = positions > queries
            if window is not None:
                is_hidden |= positions <= queries - window
        is_hidden = is_hidden.reshape(len(members), 1, -1, width)
        return _Part(
            tokens=self._tokens(batch, members, num_new),
            count=len(members),
            slots=self._cache.tensor(slots.reshape(-1)),
            mask=self._cache.mask(is_hidden) if not is_causal and is_hidden.any() else None,
            is_causal=is_causal,
        )

    def _tokens(self, batch: Batch, members: IntArray, num_new: int) -> slice | Tensor:
        starts = batch.cu_seqlens[members]
        if int(starts[-1] - starts[0]) == (len(members) - 1) * num_new:
            return slice(int(starts[0]), int(starts[-1]) + num_new)
        return self._cache.tensor((starts[:, None] + np.arange(num_new)).reshape(-1))


def _side_by_side(counts: IntArray, seen: IntArray) -> list[tuple[IntArray, int]]:
    """Sequences that are read together, by their indices, and the new tokens of each.

    `counts` are the new tokens of each, `seen` the tokens that it reads.
    """
    everyone = np.arange(len(counts))
    parts: list[tuple[IntArray, int]] = []
    for num_new in np.unique(counts).tolist():
        members = everyone[counts == num_new]
        if num_new > _MOST_SIDE_BY_SIDE:
            parts += [(members[place : place + 1], num_new) for place in range(len(members))]
        else:
            parts += [(alike, num_new) for alike in _alike(members, seen[members])]
    return parts


def _alike(members: IntArray, seen: IntArray) -> list[IntArray]:
    """`members` in parts of which none is padded to more than about twice what it reads.

    One long context among short ones would else be read once for each of them.
    """
    if len(seen) * int(seen.max()) <= 2 * int(seen.sum()) + _FREE_PADDING:
        return [members]
    parts, order = [], np.argsort(-seen, kind="stable")
    while len(order):
        count = int((seen[order] * 2 >= seen[order[0]]).sum())  # a descending list's beginning
        parts.append(np.sort(members[order[:count]]))
        order = order[count:]
    return parts


def _attend(scores: Scores, part: _Part, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [B * N, H, D], with keys and values [B * L, KV, D] that were read → the shape of `q`."""
    _, num_heads, head_dim = q.shape
    shape = (part.count, -1, keys.shape[1], head_dim)
    k = keys.view(shape).transpose(1, 2)  # [B, KV, L, D]
    v = values.view(shape).transpose(1, 2)
    if len(q) == part.count:
        # The G query heads that share a key head stand as G queries of it.
        grouped = q.reshape(part.count, k.shape[1], -1, head_dim)  # [B, KV, G, D]
        return scores.attend(grouped, k, v, mask=part.mask).reshape(q.shape)
    rows = q.reshape(part.count, -1, num_heads, head_dim).transpose(1, 2)  # [B, H, N, D]
    out = scores.attend(rows, k, v, mask=part.mask, is_causal=part.is_causal)
    return out.transpose(1, 2).reshape(q.shape)
