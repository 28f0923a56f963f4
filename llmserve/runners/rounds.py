"""Several rounds of decoding in one step, one batch after another: for runners in Python.

The C++ executor does the same between two runs of its program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from .protocol import Batch, GroupTables, IntArray, SamplingRow, StepResult

__all__ = ["Ends", "common_ends", "join_rounds", "next_round", "repeat", "rows_after", "run_rounds"]

_NO_COPIES: IntArray = np.empty((0, 2), dtype=np.int64)


def repeat(compute: Callable[[Batch], StepResult], batch: Batch, block_size: int) -> StepResult:
    """All rounds of `batch` by `compute`, which takes one at a time: the simplest right way."""
    current = dataclasses.replace(batch, num_rounds=1)

    def following(drawn: list[IntArray]) -> StepResult:
        nonlocal current
        if drawn:
            current = next_round(current, drawn[-1], block_size)
        return compute(current)

    return run_rounds(following, batch)


def run_rounds(compute: Callable[[list[IntArray]], StepResult], batch: Batch) -> StepResult:
    """The rounds of `batch` until there is a reason to stop: a row that cannot be used, or every
    sequence's end.

    `compute` gives a round's result from the ids [S] that each round before it drew.
    """
    results: list[StepResult] = []
    drawn: list[IntArray] = []
    ends = Ends(batch.sampling)
    for _ in range(batch.num_rounds):
        results.append(compute(drawn))
        drawn.append(results[-1].token_ids)
        if results[-1].is_finite is not None or ends.are_met(drawn[-1]):
            break
    return join_rounds(results)


def next_round(batch: Batch, token_ids: IntArray, block_size: int) -> Batch:
    """The batch of the round after `batch`, [S] `token_ids` being what that drew.

    Its rows of sampling are new ones, with the tokens drawn: O(tokens of all sequences).
    """
    positions = batch.positions + 1
    places = (positions // block_size)[:, None]
    return dataclasses.replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        context_lens=batch.context_lens + 1,
        groups=[
            GroupTables(
                slot_mapping=np.take_along_axis(one.block_tables, places, axis=1)[:, 0] * block_size
                + positions % block_size,
                block_tables=one.block_tables,
                block_copies=_NO_COPIES,
            )
            for one in batch.groups
        ],
        sampling=rows_after(batch.sampling, [token_ids]),
        num_rounds=1,
    )


def rows_after(rows: list[SamplingRow], drawn: Sequence[IntArray]) -> list[SamplingRow]:
    """New rows with the ids appended that each round drew, [S] each. O(tokens of all)."""
    more: list[list[int]] = np.stack(drawn).T.tolist()
    return [
        dataclasses.replace(row, token_ids=row.token_ids + ids)
        for row, ids in zip(rows, more, strict=True)
    ]


def common_ends(rows: list[SamplingRow]) -> tuple[int, ...]:
    """The ids that end every row's sequence, or none where rows differ.

    Rounds may stop once each row has drawn one of them.
    """
    ends = {row.end_token_ids for row in rows}
    return ends.pop() if len(ends) == 1 else ()


class Ends:
    """Whether every sequence has drawn an id that ends it."""

    def __init__(self, rows: list[SamplingRow]) -> None:
        self._ids = common_ends(rows)
        self._open = set(range(len(rows))) if self._ids else None

    def are_met(self, token_ids: IntArray) -> bool:
        """Take in a round's ids [S], and tell. O(S)."""
        if self._open is None:
            return False
        ids: list[int] = token_ids.tolist()
        self._open -= {place for place in self._open if ids[place] in self._ids}
        return not self._open


def join_rounds(results: list[StepResult]) -> StepResult:
    """The results of rounds, of which the last alone may have unusable rows, as one."""
    if len(results) == 1:
        return results[0]
    token_ids = np.concatenate([one.token_ids for one in results])
    is_finite = results[-1].is_finite
    if is_finite is not None:
        before = np.ones(len(token_ids) - len(is_finite), dtype=np.bool_)
        is_finite = np.concatenate([before, is_finite])
    return StepResult(token_ids=token_ids, is_finite=is_finite)
