"""From the scheduler's choice to the packed arrays that a runner computes."""

from __future__ import annotations

import numpy as np

from ..runners.protocol import Batch, IntArray
from .block_pool import slots_for
from .scheduler import ScheduledSequence

__all__ = ["build_batch"]


def build_batch(scheduled: list[ScheduledSequence], block_size: int) -> Batch:
    """Pack the tokens of one step, sequence after sequence, in the order of `scheduled`."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    offsets = [0]
    context_lens: list[int] = []
    logits_indices: list[int] = []
    sampling = []
    for item in scheduled:
        sequence = item.sequence
        first = sequence.num_computed_tokens
        last = first + item.num_tokens
        token_ids += sequence.token_ids[first:last]
        positions += range(first, last)
        slots += slots_for(sequence.block_table, first, last, block_size)
        offsets.append(len(token_ids))
        context_lens.append(last)
        if item.needs_logits:
            logits_indices.append(len(token_ids) - 1)
            sampling.append(sequence.sampling_row())
    return Batch(
        token_ids=_array(token_ids),
        positions=_array(positions),
        slot_mapping=_array(slots),
        cu_seqlens=_array(offsets),
        context_lens=_array(context_lens),
        block_tables=_pad_tables([item.sequence.block_table for item in scheduled]),
        logits_indices=_array(logits_indices),
        sampling=sampling,
    )


def _array(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def _pad_tables(tables: list[list[int]]) -> IntArray:
    width = max(map(len, tables), default=0)
    padded = [table + [0] * (width - len(table)) for table in tables]
    return np.array(padded, dtype=np.int64).reshape(len(tables), width)
