"""Attention of a step on a GPU: tiles for the Triton kernel, planned on the host.

The plan is made from the batch's own arrays and goes to the device in one copy that the host does
not wait for; each layer is then a kernel that writes its keys and values, and up to three more.

Shapes: T tokens in the step, S sequences, H query heads, KV key heads, G = H / KV, D head_dim.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..model.layers import Rotation
from ..model.scores import Scores
from .protocol import Batch, GroupTables, IntArray
from .torch_cache import PagedCache
from .torch_transfer import upload
from .torch_triton_attention import SPAN, TILE_FIELDS, TileReads, paged_attention, tile_tokens
from .torch_triton_heads import HeadNorms, keep_heads

__all__ = ["GpuAttention", "GpuTokenAttention"]

_MOST_IN_SPANS = 16
"""New tokens up to which a sequence is read in spans by many programs: a token and its drafts. More
fill the device with their tiles."""


class GpuAttention:
    """`Attend` for one step: built from its batch, called once per layer, then dropped.

    Queries may have any number of heads that the key heads divide; the first layer says which.
    """

    def __init__(self, batch: Batch, cache: PagedCache, scores: Scores) -> None:
        self._batch, self._cache, self._scores = batch, cache, scores
        self._slots: list[Tensor] = []
        self._reads: list[TileReads] = []

    def __call__(
        self, layer_index: int, q: Tensor, k: Tensor, v: Tensor,
        rotation: Rotation | None = None, norms: HeadNorms | None = None,
    ) -> Tensor:  # fmt: skip
        """Write `k`, `v` [T, KV, D]; return the attention of `q` [T, H, D] as [T, H, D].

        Queries and keys pass `norms` first, and are turned by `rotation`.
        """
        if not self._reads:
            self._plan(q, k.shape[1])
        group = self._cache.group_of[layer_index]
        layer = self._cache.layers[layer_index]
        q = keep_heads(q, k, v, layer, self._slots[group], rotation, norms)
        scale = q.shape[-1] ** -0.5 if self._scores.scale is None else self._scores.scale
        return paged_attention(q, layer, self._reads[group], scale=scale, cap=self._scores.cap)

    def _plan(self, q: Tensor, num_kv_heads: int) -> None:
        batch, cache = self._batch, self._cache
        is_prefill = np.diff(batch.cu_seqlens) > _MOST_IN_SPANS
        prefill = _tiles(batch, is_prefill, tile_tokens(q, num_kv_heads, is_prefill=True))
        spans = _tiles(batch, ~is_prefill, tile_tokens(q, num_kv_heads, is_prefill=False))
        arrays = [prefill, spans]
        for index, group in enumerate(batch.groups):
            rows = _span_rows(spans, cache.groups[index].window)
            arrays += [group.slot_mapping, group.block_tables, rows]
        tiles, span_tiles, *rest = upload(arrays, cache.device)
        for index, layers in enumerate(cache.groups):
            slots, tables, rows_there = rest[3 * index : 3 * index + 3]
            self._slots.append(slots)
            self._reads.append(
                TileReads(
                    block_tables=tables,
                    block_size=cache.block_size,
                    window=layers.window,
                    prefill_tiles=tiles,
                    span_tiles=span_tiles,
                    span_rows=rows_there,
                    max_spans=int(arrays[3 * index + 4][:, 1].max(initial=0)),
                )
            )


class GpuTokenAttention(GpuAttention):
    """`Attend` of the deterministic mode: each token of a tile is read as a sequence of its own.

    A row then follows from its position and context alone, in a prefill too. The tile's first rows
    are the tokens given; what rows behind them write and read is thrown away.
    """

    def __init__(self, batch: Batch, cache: PagedCache, scores: Scores, tokens: IntArray) -> None:
        """`tokens` are packed indices, by ascending position."""
        super().__init__(batch, cache, scores)
        self._tokens = tokens

    def _plan(self, q: Tensor, num_kv_heads: int) -> None:
        self._batch = _each_alone(self._batch, self._cache, self._tokens, len(q))
        super()._plan(q, num_kv_heads)


def _each_alone(batch: Batch, cache: PagedCache, tokens: IntArray, num_rows: int) -> Batch:
    """The tokens as so many sequences of one token, filled up with rows of padding."""

    def filled(values: IntArray, padding: int = 0) -> IntArray:
        widths = [(0, num_rows - len(values))] + [(0, 0)] * (values.ndim - 1)
        return np.pad(values, widths, constant_values=padding)

    sequences = np.searchsorted(batch.cu_seqlens, tokens, side="right") - 1
    positions = filled(batch.positions[tokens])
    return Batch(
        token_ids=filled(batch.token_ids[tokens]),
        positions=positions,
        cu_seqlens=np.arange(num_rows + 1),
        context_lens=positions + 1,
        groups=[
            GroupTables(
                slot_mapping=filled(group.slot_mapping[tokens], spare),
                block_tables=filled(group.block_tables[sequences]),
                block_copies=np.empty((0, 2), dtype=np.int64),
            )
            for group, spare in zip(batch.groups, cache.spare_slots, strict=True)
        ],
        logits_indices=np.empty(0, dtype=np.int64),
        sampling=[],
    )


def _tiles(batch: Batch, is_member: np.ndarray, most_tokens: int) -> IntArray:
    """The members' new tokens in tiles, [tiles, TILE_FIELDS]."""
    counts = np.where(is_member, np.diff(batch.cu_seqlens), 0)
    num_tiles = -(-counts // most_tokens)
    sequences = np.repeat(np.arange(len(counts)), num_tiles)
    nth = np.arange(len(sequences)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    skipped = nth * most_tokens
    sizes = np.minimum(counts[sequences] - skipped, most_tokens)
    positions = (batch.context_lens - counts)[sequences] + skipped
    packed = batch.cu_seqlens[sequences] + skipped
    fields = (sequences, packed, sizes, positions, np.cumsum(sizes) - sizes)
    return np.stack(fields, axis=1).reshape(-1, TILE_FIELDS)


def _span_rows(tiles: IntArray, window: int | None) -> IntArray:
    """Of each token in `tiles` in their order: its packed index and its number of spans, [P, 2].

    Spans are counted from the first that its tile reads.
    """
    _, packed, sizes, positions, starts = tiles.T
    lowest = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    within = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    last = np.repeat(positions, sizes) + within
    spans = last // SPAN - np.repeat(lowest // SPAN, sizes) + 1
    return np.stack((np.repeat(packed, sizes) + within, spans), axis=1)
