"""Documents packed into windows so that none sees another: best fit, fresh positions, own loss.

    window     | document 7      | document 3   | 12 | unused |
    positions  | 0 1 2 3 4 5 6 7 | 0 1 2 3 4 5  | 0 1| 0  0  0|

A document of more tokens than the context is cut into pieces of the context's length; what is left
over goes, the longest first, to the window where it leaves the least room (Ding et al., Fewer
Truncations Improve Language Modeling, arXiv:2404.10830, section 2). No document is cut that fits.
A token's place says where its piece begins, so positions carry the whole structure: attention
reads it from them (`attention.PackedAttention`), and an unused place is a piece of its own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmserve.errors import DataError

from .batches import IGNORED, TokenIds, epoch_random

__all__ = ["PackedWindows", "Packing", "pack_documents"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packing:
    """Which pieces of a text make which window."""

    starts: IntArray
    """Token offset of every piece."""
    lengths: IntArray
    """Tokens of every piece, 1..context."""
    first_pieces: IntArray
    """[windows + 1]: window w has the pieces from first_pieces[w] up to first_pieces[w + 1]."""
    context: int
    """Places of a window."""

    @property
    def num_windows(self) -> int:
        """Windows in all."""
        return len(self.first_pieces) - 1

    @property
    def wasted_share(self) -> float:
        """Unused places among all places of all windows."""
        return 1 - float(self.lengths.sum()) / (self.num_windows * self.context)

    @property
    def window_tokens(self) -> IntArray:
        """[windows]: tokens in each."""
        sums = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.diff(sums[self.first_pieces])


def pack_documents(document_starts: IntArray, num_tokens: int, *, context: int) -> Packing:
    """Pack the documents that begin at `document_starts`, ascending from 0, in `num_tokens`.

    O(pieces · log pieces). The same documents give the same packing.
    """
    starts, lengths = _pieces(document_starts, num_tokens, context)
    windows = [[piece] for piece in np.flatnonzero(lengths == context).tolist()]
    windows += _best_fit(lengths, context)
    order = [piece for window in windows for piece in window]
    sizes = np.array([0, *map(len, windows)], dtype=np.int64)
    return Packing(starts[order], lengths[order], np.cumsum(sizes), context)


def _pieces(document_starts: IntArray, num_tokens: int, context: int) -> tuple[IntArray, IntArray]:
    """Offset and length of every piece, in the order of the text."""
    sizes = np.diff(np.append(document_starts, num_tokens))
    counts = -(-sizes // context)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    number = np.arange(len(first)) - first  # of the piece in its document
    starts = np.repeat(document_starts, counts) + number * context
    lengths = np.minimum(context, np.repeat(sizes, counts) - number * context)
    return starts, lengths


def _best_fit(lengths: IntArray, context: int) -> list[list[int]]:
    """Windows of the pieces that are shorter than `context`, the longest placed first."""
    short = np.flatnonzero(lengths < context)
    windows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # a bit for every room that some window has
    for piece in short[np.argsort(-lengths[short], kind="stable")].tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, window = context, len(windows)
            windows.append([])
        windows[window].append(piece)
        with_room[room - length].append(window)
        rooms |= 1 << (room - length)
    return windows


class PackedWindows:
    """Windows of whole documents, read by position; a new order in every pass."""

    def __init__(
        self,
        ids: TokenIds,
        document_starts: IntArray,
        *,
        context: int,
        seed: int | None,
        end_id: int | None,
    ) -> None:
        """Pack at once, in memory: 24 bytes for a piece.

        Args:
            ids: The text's tokens.
            document_starts: Offsets at which documents begin.
            context: Places of a window.
            seed: Of the order; None: as packed, for evaluation.
            end_id: Target of a document's last token; None: it has none.

        Raises:
            DataError: no document.
        """
        if not len(document_starts):
            raise DataError("there is no document to pack into windows")
        self.packing = pack_documents(document_starts, len(ids), context=context)
        """Which documents are where."""
        self.windows_per_epoch = self.packing.num_windows
        """Windows in one pass."""
        self._ids = ids
        self._seed = seed
        self._end_id = end_id
        ends = np.append(document_starts[1:], len(ids))
        self._is_last = np.isin(self.packing.starts + self.packing.lengths, ends)
        self._targets = self._count_targets()
        self._epoch = -1
        self._order: IntArray = np.arange(self.windows_per_epoch)

    def num_targets(self, position: int, count: int) -> int:
        """Tokens to predict in the `count` windows from `position` on."""
        return int(sum(self._targets[self._window(position + i)] for i in range(count)))

    def read(self, position: int, count: int) -> tuple[torch.Tensor, ...]:
        """Inputs, targets and positions of those windows, each int64 [count, context]."""
        shape = (count, self.packing.context)
        inputs, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        for row in range(count):
            self._fill(self._window(position + row), inputs[row], targets[row], positions[row])
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions)

    def _fill(self, window: int, inputs: Any, targets: Any, positions: Any) -> None:
        place = 0
        first, last = self.packing.first_pieces[window : window + 2].tolist()
        for piece in range(first, last):
            start, length = int(self.packing.starts[piece]), int(self.packing.lengths[piece])
            here = slice(place, place + length)
            tokens = self._ids[start : start + length + 1].astype(np.int64)
            inputs[here], positions[here] = tokens[:length], np.arange(length)
            targets[here] = self._following(piece, tokens, length)
            place += length

    def _following(self, piece: int, tokens: IntArray, length: int) -> IntArray:
        """What comes after each token of a piece: at a document's end the end token."""
        if not self._is_last[piece]:
            return tokens[1:]
        end = IGNORED if self._end_id is None else self._end_id
        return np.append(tokens[1:length], end)

    def _count_targets(self) -> IntArray:
        """[windows]: tokens to predict in each."""
        lengths = self.packing.lengths
        known = lengths if self._end_id is not None else lengths - self._is_last
        sums = np.concatenate([[0], np.cumsum(known)])
        return np.diff(sums[self.packing.first_pieces])

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, self.windows_per_epoch)
        if self._seed is not None and epoch != self._epoch:
            self._order = epoch_random(self._seed, epoch).permutation(self.windows_per_epoch)
            self._epoch = epoch
        return int(self._order[index])
