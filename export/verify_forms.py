"""Every way in which a runner may come to a token's logits, driven without an engine.

paged       a text in one step, its keys and values in scattered blocks
chunked     the text in pieces of odd sizes
decode      its last tokens one at a time
prefix hit  a second sequence that holds the first one's blocks and computes the rest
batched     beside all other texts, in one step

Shapes: L tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from llmserve.quant.dtypes import Float32Array
from llmserve.runners.protocol import Batch, GroupTables, IntArray, PromptRows, Runner

__all__ = ["FORMS", "ComparableRunner", "prepare", "run_form"]

_BLOCK = 16
_CHUNKS = (5, 1, 16, 7)
_NUM_DECODED = 16

Window = Sequence[int]


class ComparableRunner(Runner, Protocol):
    """A runner that shows its logits to who compares models."""

    def logits(self, tokens: range) -> Float32Array:
        """Of tokens of the last step, by packed index, [n, V]."""


def prepare(runner: ComparableRunner, windows: Sequence[Window]) -> None:
    """Allocate a cache for all windows at once, and a block more for each."""
    blocks = sum(-(-len(window) // _BLOCK) + 1 for window in windows)
    runner.allocate_cache((blocks,) * len(runner.info.cache_groups), _BLOCK)


def run_form(
    name: str, runner: ComparableRunner, windows: Sequence[Window]
) -> Iterator[Float32Array]:
    """The logits [L, V] of every window, computed as the form `name` says."""
    if name == "batched":
        yield from _step(runner, [(window, 0, _table(index, windows)) for index, window in
                                  enumerate(windows)])  # fmt: skip
        return
    for index, window in enumerate(windows):
        yield FORMS[name](runner, window, _table(index, windows))


def _table(index: int, windows: Sequence[Window]) -> list[int]:
    """Blocks of a window and one more, in an order that is not theirs in memory."""
    first = sum(-(-len(window) // _BLOCK) + 1 for window in windows[:index])
    return list(range(first, first + -(-len(windows[index]) // _BLOCK) + 1))[::-1]


def _paged(runner: ComparableRunner, window: Window, table: list[int]) -> Float32Array:
    return _step(runner, [(window, 0, table)])[0]


def _chunked(runner: ComparableRunner, window: Window, table: list[int]) -> Float32Array:
    ends: list[int] = []
    end = 0
    while end < len(window):
        end = min(end + _CHUNKS[len(ends) % len(_CHUNKS)], len(window))
        ends.append(end)
    return _pieces(runner, window, table, ends)


def _decode(runner: ComparableRunner, window: Window, table: list[int]) -> Float32Array:
    first = max(1, len(window) - _NUM_DECODED)
    return _pieces(runner, window, table, list(range(first, len(window) + 1)))


def _pieces(
    runner: ComparableRunner, window: Window, table: list[int], ends: list[int]
) -> Float32Array:
    starts = [0, *ends[:-1]]
    parts = [
        _step(runner, [(window[start:end], start, table)])[0]
        for start, end in zip(starts, ends, strict=True)
    ]
    return np.concatenate(parts)


def _prefix_hit(runner: ComparableRunner, window: Window, table: list[int]) -> Float32Array:
    first = _step(runner, [(window, 0, table)])[0]
    shared = (len(window) - 1) // _BLOCK
    start = min(shared * _BLOCK, len(window) - 1)
    own = [*table[:shared], table[-1]]  # the spare block takes the rest
    rest = _step(runner, [(window[start:], start, own)])[0]
    return np.concatenate([first[:start], rest])


FORMS: dict[str, Callable[[ComparableRunner, Window, list[int]], Float32Array]] = {
    "paged": _paged,
    "chunked": _chunked,
    "decode": _decode,
    "prefix hit": _prefix_hit,
    "batched": _paged,
}
"""Name → one window's logits. `prefix hit` is for runners whose sequences may share blocks."""


def _step(
    runner: ComparableRunner, shares: Sequence[tuple[Window, int, list[int]]]
) -> list[Float32Array]:
    """One step over sequences (tokens, position of the first, block table): logits of each."""
    lengths = [len(tokens) for tokens, _, _ in shares]
    offsets = np.cumsum([0, *lengths])
    batch = _batch(shares, offsets, len(runner.info.cache_groups))
    runner.submit(batch)
    runner.collect()
    return [runner.logits(range(int(start), int(stop))) for start, stop in pairwise(offsets)]


def _batch(
    shares: Sequence[tuple[Window, int, list[int]]], offsets: IntArray, num_groups: int
) -> Batch:
    positions = [np.arange(first, first + len(tokens)) for tokens, first, _ in shares]
    slots = [
        np.array(table)[places // _BLOCK] * _BLOCK + places % _BLOCK
        for (_, _, table), places in zip(shares, positions, strict=True)
    ]
    width = max(len(table) for _, _, table in shares)
    tables = GroupTables(
        slot_mapping=np.concatenate(slots),
        block_tables=np.array([table + [0] * (width - len(table)) for _, _, table in shares]),
        block_copies=np.empty((0, 2), np.int64),
    )
    rows = [
        PromptRows(start=int(start), targets=[0] * len(tokens), num_top=0)
        for start, (tokens, _, _) in zip(offsets[:-1], shares, strict=True)
    ]
    return Batch(
        token_ids=np.concatenate([np.array(tokens, np.int64) for tokens, _, _ in shares]),
        positions=np.concatenate(positions),
        cu_seqlens=offsets,
        context_lens=np.array([first + len(tokens) for tokens, first, _ in shares]),
        groups=[tables] * num_groups,
        logits_indices=np.empty(0, np.int64),
        sampling=[],
        prompt_rows=rows,
    )
