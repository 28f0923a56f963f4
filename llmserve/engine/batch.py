"""From the scheduler's choice to the packed arrays that a runner computes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TypeVar

import numpy as np

from ..runners.protocol import Batch, HeadRows, HiddenSum, IntArray, PromptRows, SamplingRow
from .kv_cache import KVCache
from .request import Pooling, Scoring
from .running import RunningTable
from .step import Chunk, Step

__all__ = ["build_batch"]

Wanted = TypeVar("Wanted", PromptRows, HiddenSum, HeadRows)


def build_batch(step: Step, running: RunningTable, kv: KVCache, block_size: int) -> Batch:
    """Pack the tokens of one step: the decodes by whole columns, the chunks one after another."""
    chunks, rows = step.chunks, step.decode_rows
    context_lens = step.decode_lengths
    positions = context_lens - 1
    token_ids = running.last_token[rows]
    row_of_token, offsets = rows, np.arange(len(rows) + 1)
    if chunks:
        lengths = np.ones(len(rows), dtype=np.int64)
        rows = np.concatenate([rows, _array([chunk.sequence.row for chunk in chunks])])
        token_ids = np.concatenate([token_ids, *map(_token_ids, chunks)])
        positions = np.concatenate([positions, *map(_positions, chunks)])
        sizes = _array([chunk.num_tokens for chunk in chunks])
        context_lens = np.concatenate([context_lens, _array([c.start for c in chunks]) + sizes])
        lengths = np.concatenate([lengths, sizes])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        row_of_token = np.repeat(rows, lengths)
    places, rest = positions // block_size, positions % block_size
    return Batch(
        token_ids=token_ids,
        positions=positions,
        cu_seqlens=offsets,
        context_lens=context_lens,
        groups=[
            group.pack(rows, group.tables[row_of_token, places] * block_size + rest)
            for group in kv.groups
        ],
        logits_indices=_logits_indices(step, offsets),
        sampling=_sampling_rows(step),
        num_rounds=step.num_rounds,
        fed_rows=step.fed_rows,
        adapter_ids=_adapter_ids(running, rows),
        prompt_rows=_wanted(_prompt_rows, step, offsets),
        hidden_sums=_wanted(_hidden_sums, step, offsets),
        head_rows=_wanted(_head_rows, step, offsets),
    )


def _array(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def _token_ids(chunk: Chunk) -> IntArray:
    return _array(chunk.sequence.token_ids[chunk.start : chunk.stop] + chunk.draft_ids)


def _positions(chunk: Chunk) -> IntArray:
    return np.arange(chunk.start, chunk.start + chunk.num_tokens)


def _wanted(
    ask: Callable[[Chunk, int], list[Wanted]], step: Step, offsets: IntArray
) -> list[Wanted]:
    """What the chunks want beside tokens; `ask` takes a chunk and its first packed index."""
    if not step.chunks:
        return []
    starts: list[int] = offsets[len(step.decodes) : -1].tolist()
    return list(chain.from_iterable(map(ask, step.chunks, starts)))


def _logits_indices(step: Step, offsets: IntArray) -> IntArray:
    decodes = offsets[: len(step.decodes)]
    if not step.chunks:
        return decodes
    ends: list[int] = offsets[len(step.decodes) + 1 :].tolist()
    drawn = [
        np.arange(end - chunk.num_draws, end)
        for chunk, end in zip(step.chunks, ends, strict=True)
        if chunk.num_draws
    ]
    return np.concatenate([decodes, *drawn])


def _sampling_rows(step: Step) -> list[SamplingRow]:
    rows = [sequence.sampling for sequence in step.decodes]
    for chunk in step.chunks:
        if chunk.num_draws:
            rows.append(chunk.sequence.sampling)
            rows += [_row_after(chunk, count) for count in range(1, len(chunk.draft_ids) + 1)]
    return rows


def _row_after(chunk: Chunk, num_drafts: int) -> SamplingRow:
    """How the token after `num_drafts` accepted drafts would be drawn."""
    row = chunk.sequence.sampling
    return SamplingRow(
        params=row.params,
        seed=row.seed,
        choice_index=row.choice_index,
        token_ids=row.token_ids + chunk.draft_ids[:num_drafts],
        num_prompt_tokens=row.num_prompt_tokens,
        end_token_ids=row.end_token_ids,
    )


def _adapter_ids(running: RunningTable, rows: IntArray) -> IntArray | None:
    if not running.num_with_adapter:
        return None
    ids = running.adapter_id[rows]
    return ids if ids.any() else None


def _prompt_rows(chunk: Chunk, offset: int) -> list[PromptRows]:
    """The positions of a chunk whose logits tell about prompt tokens not yet told about."""
    sequence = chunk.sequence
    first = max(chunk.start, len(sequence.prompt_logprobs))
    last = min(chunk.stop, sequence.num_prompt_tokens - 1)
    chunk.has_prompt_rows = sequence.owes_prompt_logprobs and first < last
    if not chunk.has_prompt_rows:
        return []
    return [
        PromptRows(
            start=offset + first - chunk.start,
            targets=sequence.token_ids[first + 1 : last + 1],
            num_top=sequence.request.sampling_params.prompt_logprobs or 0,
        )
    ]


def _hidden_sums(chunk: Chunk, offset: int) -> list[HiddenSum]:
    pooling = chunk.sequence.request.pooling
    end = offset + chunk.stop - chunk.start
    chunk.has_hidden_sum = True
    if pooling is Pooling.MEAN:
        return [HiddenSum(start=offset, stop=end, carry=chunk.sequence.hidden_sum)]
    if pooling is Pooling.LAST and chunk.is_last:
        return [HiddenSum(start=end - 1, stop=end, carry=None)]
    chunk.has_hidden_sum = False
    return []


def _head_rows(chunk: Chunk, offset: int) -> list[HeadRows]:
    """The tokens of a chunk that the model's head is to score."""
    scoring = chunk.sequence.request.scoring
    end = offset + chunk.stop - chunk.start
    chunk.has_head_rows = scoring is Scoring.EACH or (scoring is Scoring.LAST and chunk.is_last)
    if not chunk.has_head_rows:
        return []
    return [HeadRows(start=offset if scoring is Scoring.EACH else end - 1, stop=end)]
