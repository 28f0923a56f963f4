"""A decode step of one fixed shape: its inputs stay where they are, only their values change.

What a CUDA graph replays are kernels with the addresses and sizes of the step that was captured. So
a batch of decodes is filled up to a bucket of sequences and a bucket of context: rows of padding
write into the cache's spare slot, read nothing, and are thrown away; programs of spans that a
context does not reach return at once.

Shapes: B sequences of the bucket, N spans of its longest context, W blocks of that context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.scores import Scores
from .protocol import Batch, GroupTables, IntArray
from .torch_cache import PagedCache
from .torch_gpu_attention import GpuAttention
from .torch_transfer import num_words, packed, unpack
from .torch_triton_attention import SPAN, TILE_FIELDS, TileReads

__all__ = ["StaticInputs", "StepShape"]

_MOST_ROWS = 512
_MOST_PARTS = 4096
"""Rows times spans of a bucket. What spans leave to be joined takes memory for each, and a step
that reads so much keeps the device busy without a graph."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What steps must have in common to be replayed by one graph."""

    num_rows: int
    """B: 1, 2, 4, 8, then multiples of 8."""
    num_spans: int
    """N: powers of 4, so that at most three of four programs have nothing to read."""

    @classmethod
    def of(cls, batch: Batch) -> StepShape | None:
        """The bucket of a batch; None: it is no plain decode, or a large one."""
        count = len(batch.context_lens)
        if batch.num_tokens != count or batch.adapter_ids is not None or count > _MOST_ROWS:
            return None
        num_rows = -(-count // 8) * 8 if count > 8 else 1 << (count - 1).bit_length()
        num_spans, longest = 1, int(batch.context_lens.max())
        while num_spans * SPAN < longest:
            num_spans *= 4
        return cls(num_rows, num_spans) if num_rows * num_spans <= _MOST_PARTS else None


class StaticInputs:
    """The arrays of a step on the device, always at the same place."""

    def __init__(self, shape: StepShape, cache: PagedCache) -> None:
        """Make room, filled with padding alone."""
        self._shape, self._cache = shape, cache
        arrays = self._padded(None)
        self._words = torch.empty(num_words(arrays), dtype=torch.int64, device=cache.device)
        views = unpack(self._words, arrays)
        self.token_ids, self.positions, self._tiles = views[:3]
        self._groups = [views[start : start + 3] for start in range(3, len(views), 3)]
        self.write(None)

    def write(self, batch: Batch | None) -> None:
        """Put a batch of this shape in place, in one copy that is not waited for; None: nothing."""
        words = packed(self._padded(batch), self._words.device)
        self._words.copy_(words, non_blocking=True)

    def attention(self, scores: Scores) -> GpuAttention:
        """Attention of whatever batch is in place."""
        slots, reads = [], []
        for group, (new_slots, tables, rows) in zip(self._cache.groups, self._groups, strict=True):
            slots.append(new_slots)
            reads.append(
                TileReads(
                    block_tables=tables,
                    block_size=self._cache.block_size,
                    window=group.window,
                    prefill_tiles=self._tiles[:0],
                    span_tiles=self._tiles,
                    span_rows=rows,
                    max_spans=self._most_spans(group.window),
                )
            )
        return _StaticAttention(self._cache, scores, slots, reads)

    def _most_spans(self, window: int | None) -> int:
        """Spans that one token of the bucket can see."""
        touched = self._shape.num_spans if window is None else (window + SPAN - 2) // SPAN + 1
        return min(self._shape.num_spans, touched)

    def _padded(self, batch: Batch | None) -> list[IntArray]:
        """Token ids, positions, tiles; for each group new slots, block tables, rows and spans."""
        ids, positions = (self._filled(values) for values in _of_tokens(batch))
        count = 0 if batch is None else batch.num_tokens
        rows = np.arange(self._shape.num_rows)
        is_real = rows < count
        tiles = np.zeros((len(rows), TILE_FIELDS), dtype=np.int64)
        tiles[:, 0] = tiles[:, 1] = tiles[:, 4] = rows
        tiles[:, 2], tiles[:, 3] = is_real, positions
        arrays = [ids, positions, tiles]
        for index, group in enumerate(self._cache.groups):
            lowest = np.zeros_like(positions)
            if group.window is not None:
                lowest = np.maximum(positions - group.window + 1, 0)
            spans = (positions // SPAN - lowest // SPAN + 1) * is_real
            arrays += self._filled_tables(index, None if batch is None else batch.groups[index])
            arrays.append(np.stack((rows, spans), axis=1))
        return arrays

    def _filled_tables(self, index: int, tables: GroupTables | None) -> tuple[IntArray, IntArray]:
        """New slots [B] and block tables [B, W] of a group."""
        width = -(-self._shape.num_spans * SPAN // self._cache.block_size)
        slots = np.full(self._shape.num_rows, self._cache.spare_slots[index])
        blocks = np.zeros((self._shape.num_rows, width), dtype=np.int64)
        if tables is not None:
            slots[: len(tables.slot_mapping)] = tables.slot_mapping
            given = tables.block_tables[:, :width]
            blocks[: len(given), : given.shape[1]] = given
        return slots, blocks

    def _filled(self, values: IntArray) -> IntArray:
        return np.pad(values, (0, self._shape.num_rows - len(values)))


class _StaticAttention(GpuAttention):
    """Attention whose plan is there before any batch is."""

    def __init__(
        self, cache: PagedCache, scores: Scores, slots: list[Tensor], reads: list[TileReads]
    ) -> None:
        self._cache, self._scores = cache, scores
        self._slots, self._reads = slots, reads


def _of_tokens(batch: Batch | None) -> tuple[IntArray, IntArray]:
    if batch is None:
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing
    return batch.token_ids, batch.positions
