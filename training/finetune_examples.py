"""Examples: rows as token ids with targets, cut to length, and batches of them.

Shapes: B rows, T tokens of the longest one. A batch is filled up on the right: attention looks
back alone, so what stands behind a row's last token changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llmserve.errors import DataError

from .batches import IGNORED

__all__ = ["Example", "Lengths", "RowOrder", "TokenRow", "batches", "fill_up"]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The ids of one text, and for each what is to be predicted after it."""

    ids: tuple[int, ...]
    targets: tuple[int, ...] = ()
    """As many as ids, each the next id or `IGNORED`; none where the task has no use for them."""

    @property
    def num_targets(self) -> int:
        """Predictions that are part of the loss."""
        return sum(target != IGNORED for target in self.targets)

    @classmethod
    def predicting(cls, ids: Sequence[int], is_target: Sequence[bool]) -> TokenRow:
        """A row in which those ids are to be predicted that `is_target` marks."""
        following = zip(ids[1:], is_target[1:], strict=True)
        targets = (*(token if wanted else IGNORED for token, wanted in following), IGNORED)
        return cls(tuple(ids), targets)

    def cut(self, length: int) -> TokenRow:
        """The first `length` ids; nothing is predicted after the last of them."""
        targets = (*self.targets[: length - 1], IGNORED) if self.targets else ()
        return TokenRow(self.ids[:length], targets)


@dataclass(frozen=True, slots=True)
class Example:
    """What one row of the data became."""

    rows: tuple[TokenRow, ...]
    """Its texts: one, or those that are compared."""

    @property
    def length(self) -> int:
        """Ids of the longest text."""
        return max(len(row.ids) for row in self.rows)


@dataclass(slots=True)
class Lengths:
    """What is done with rows that are too long, and how often it was."""

    limit: int
    """Most ids of a row."""
    policy: Literal["truncate", "drop", "refuse"]
    """Cut at the end, leave out, or raise."""
    num_truncated: int = field(default=0, init=False)
    """Texts that were cut."""
    num_dropped: int = field(default=0, init=False)
    """Rows that were left out: too long, or with nothing to learn from after the cut."""

    def fit(self, row: TokenRow, place: str) -> TokenRow | None:
        """The row if it is short enough, else cut, or None if it is to be left out.

        Raises `DataError`, naming `place`, where long rows are refused.
        """
        if len(row.ids) <= self.limit:
            return row
        if self.policy == "refuse":
            raise DataError(
                f"{place}: has {len(row.ids)} tokens; at most {self.limit} are allowed. Shorten "
                "it, or choose --overlong truncate or drop"
            )
        cut = row.cut(self.limit)
        if self.policy == "drop" or (row.num_targets and not cut.num_targets):
            self.num_dropped += 1
            return None
        self.num_truncated += 1
        return cut

    def describe(self) -> str:
        """What was done, in words; empty: nothing."""
        parts = []
        if self.num_truncated:
            parts.append(f"{self.num_truncated} texts cut to {self.limit} tokens")
        if self.num_dropped:
            parts.append(f"{self.num_dropped} rows left out: nothing to learn within the limit")
        return "; ".join(parts)


class RowOrder:
    """Which rows make which batch: a function of the seed and of how many batches were read.

    Each pass has its own order. Within stretches of a few batches rows of like length come
    together, so that little is filled up; the batches are then shuffled again.
    """

    _STRETCH = 16
    """Batches within which rows are sorted by length."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._size, self._seed = batch_size, seed
        self.batches_per_epoch = -(-len(lengths) // batch_size)
        """Batches in one pass; the last of the rows may make a smaller one."""
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, position: int) -> list[int]:
        """Indices of the rows in the batch number `position` of the run."""
        epoch, index = divmod(position, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._make(epoch), epoch
        return self._batches[index]

    def _make(self, epoch: int) -> list[list[int]]:
        random = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        order = random.permutation(len(self._lengths))
        stretch = self._size * self._STRETCH
        made = []
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            made += [part[i : i + self._size].tolist() for i in range(0, len(part), self._size)]
        return [made[index] for index in random.permutation(len(made))]


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of `size`, by length: for evaluation, where the order does not matter."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def fill_up(rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, T], targets [B, T] (`IGNORED` where a row has none) and each row's last place [B]."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        if row.targets:
            targets[index, : len(row.ids)] = torch.tensor(row.targets)
    return ids, targets, torch.tensor([len(row.ids) - 1 for row in rows])
