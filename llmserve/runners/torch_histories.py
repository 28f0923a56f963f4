"""The tokens of sequences whose penalties look back at them, kept on the device.

A sequence is copied there when it first asks, and afterwards only what it grew by; sequences
without penalties have nothing here. A place is given back when the row that held it is dropped.

Shapes: S places for sequences, L tokens kept of the longest, P rows with penalties in a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import SamplingRow
from .torch_transfer import Parcel, Sent

__all__ = ["Histories", "Place", "SeenTokens"]

_FIRST_ROWS, _FIRST_LENGTH = 8, 256


class Place:
    """One sequence's row of the table, and how many of its tokens are in it."""

    __slots__ = ("_free", "num_held", "row")

    def __init__(self, row: int, free: list[int]) -> None:
        self.row, self._free = row, free
        self.num_held = 0

    def __del__(self) -> None:
        self._free.append(self.row)


class Histories:
    """Token ids [S, L] on a device; grows as it must."""

    def __init__(self, device: torch.device) -> None:
        self.token_ids = torch.zeros((_FIRST_ROWS, _FIRST_LENGTH), dtype=torch.int64, device=device)
        """[S, L]"""
        self._free = list(range(_FIRST_ROWS - 1, -1, -1))

    def place(self) -> Place:
        """A place for a sequence that has none."""
        if not self._free:
            count, length = self.token_ids.shape
            self._grow(2 * count, length)
        return Place(self._free.pop(), self._free)

    def look_up(self, rows: list[SamplingRow], places: list[Place], parcel: Parcel) -> SeenTokens:
        """Put into the parcel what the table lacks of `rows`, each with its place."""
        table_rows: list[int] = []
        positions: list[int] = []
        token_ids: list[int] = []
        for row, place in zip(rows, places, strict=True):
            added = row.token_ids[place.num_held :]
            table_rows += [place.row] * len(added)
            positions += range(place.num_held, place.num_held + len(added))
            token_ids += added
            place.num_held += len(added)
        longest = max(row.position for row in rows)
        if longest > self.token_ids.shape[1]:
            self._grow(len(self.token_ids), max(longest, 2 * self.token_ids.shape[1]))
        return SeenTokens(
            histories=self,
            longest=longest,
            added=parcel.add([table_rows, positions, token_ids]),
            bounds=parcel.add(
                [
                    [place.row for place in places],
                    [row.num_prompt_tokens for row in rows],
                    [row.position for row in rows],
                ]
            ),
        )

    def _grow(self, count: int, length: int) -> None:
        old = self.token_ids
        self.token_ids = old.new_zeros((count, length))
        self.token_ids[: old.shape[0], : old.shape[1]] = old
        self._free += range(count - 1, old.shape[0] - 1, -1)


class SeenTokens:
    """What the rows of one step have seen; for use once the parcel was sent."""

    def __init__(self, *, histories: Histories, longest: int, added: Sent, bounds: Sent) -> None:
        self._histories, self._longest = histories, longest
        self._added, self._bounds = added, bounds

    def count(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """[P, V] which ids a sequence holds, and how often each was generated (whole float64)."""
        table = self._histories.token_ids
        table_rows, positions, added_ids = self._added.there
        table[table_rows, positions] = added_ids
        places, starts, ends = self._bounds.there[:, :, None]  # [P, 1] each
        ids = table[places[:, 0], : self._longest]  # [P, L]
        position = torch.arange(self._longest, device=ids.device)
        # What is not known, or not generated, counts for an id beyond the vocabulary.
        known = torch.where(position < ends, ids, vocab_size)
        generated = torch.where(position >= starts, known, vocab_size)
        shape = (len(ids), vocab_size + 1)
        is_seen = torch.zeros(shape, dtype=torch.bool, device=ids.device)
        is_seen.scatter_(1, known, torch.ones_like(known, dtype=torch.bool))
        counts = torch.zeros(shape, dtype=torch.float64, device=ids.device)
        counts.scatter_add_(1, generated, torch.ones_like(known, dtype=torch.float64))
        return is_seen[:, :vocab_size], counts[:, :vocab_size]
