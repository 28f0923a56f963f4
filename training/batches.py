"""The order in which a run reads its tokens: shuffled, and a function of one whole number.

The tokens are cut into windows of the context's length, with another offset in every pass so that
a window's edges do not stay where they are, and each pass visits the windows in its own order. All
of it follows from (seed, position), where the position counts windows since the start of the run:
a resumed run needs nothing else to read on where it was. `data_packing.py` has the other way,
windows that hold whole documents.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llmserve.errors import DataError

__all__ = [
    "IGNORED",
    "StreamWindows",
    "TokenIds",
    "WindowOrder",
    "Windows",
    "epoch_random",
    "read_windows",
]

IGNORED = -100
"""Target of a place that is not to be learned; torch's cross-entropy leaves it out."""


class TokenIds(Protocol):
    """The ids of a text: an array, or several that are read as one."""

    def __len__(self) -> int:
        """Tokens in all."""

    def __getitem__(self, index: slice, /) -> npt.NDArray[Any]:
        """Some of them in a row."""


class Windows(Protocol):
    """A text as windows that are read by position."""

    windows_per_epoch: int
    """Windows in one pass."""

    def num_targets(self, position: int, count: int) -> int:
        """Tokens to predict in the `count` windows from `position` on."""

    def read(self, position: int, count: int) -> tuple[torch.Tensor, ...]:
        """Inputs and targets of those windows, each int64 [count, context].

        A third tensor, where there is one, holds each token's place in its document: a row has
        several then, which must not see each other.
        """


class WindowOrder:
    """Maps positions to offsets of windows in a token file."""

    def __init__(self, num_tokens: int, *, context: int, seed: int) -> None:
        """A window is `context` tokens and the one after them.

        Raises:
            DataError: not one window whatever the offset.
        """
        self.windows_per_epoch = (num_tokens - context) // context
        """Windows in one pass; the same for every offset."""
        if self.windows_per_epoch < 1:
            raise DataError(
                f"too little text: {num_tokens} tokens to train on, and a context of {context} "
                f"needs at least {2 * context}; give more text or a smaller max_seq_len"
            )
        self._context = context
        self._seed = seed
        self._epoch = -1
        self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def starts(self, position: int, count: int) -> list[int]:
        """Token offsets of the `count` windows from `position` on."""
        return [self._start(position + i) for i in range(count)]

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.windows_per_epoch)
        if epoch != self._epoch:
            random = epoch_random(self._seed, epoch)
            offset = int(random.integers(self._context))
            order = random.permutation(self.windows_per_epoch)
            self._starts = order.astype(np.int64) * self._context + offset
            self._epoch = epoch
        return int(self._starts[index])


class StreamWindows:
    """Windows cut out of the whole text, whatever document they begin in. None is wasted."""

    def __init__(self, ids: TokenIds, *, context: int, seed: int) -> None:
        """Raises `DataError` if the text is too short for one window."""
        self._ids, self._context = ids, context
        self._order = WindowOrder(len(ids), context=context, seed=seed)
        self.windows_per_epoch = self._order.windows_per_epoch
        """Windows in one pass."""

    def num_targets(self, position: int, count: int) -> int:
        """Tokens to predict in `count` windows: every one of them."""
        return count * self._context

    def read(self, position: int, count: int) -> tuple[torch.Tensor, ...]:
        """Inputs and targets of the `count` windows from `position` on."""
        return read_windows(self._ids, self._order.starts(position, count), self._context)


def read_windows(
    ids: TokenIds, starts: list[int], context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets at `starts`, each int64 [windows, context]; targets are one token on."""
    rows = np.stack([ids[start : start + context + 1] for start in starts]).astype(np.int64)
    tokens = torch.from_numpy(rows)
    return tokens[:, :-1], tokens[:, 1:]


def epoch_random(seed: int, epoch: int) -> np.random.Generator:
    """What one pass draws from. Philox counts from a key: no state goes from one to the next."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch]))
