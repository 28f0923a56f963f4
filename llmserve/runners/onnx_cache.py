"""The keys and values of an exported decoder: our own memory, which the graph writes in place.

Every sequence has a row, and all rows have equal room. The operator of the graph reserves scores
for the whole room of a row and walks keys in steps of it, so long rows make short texts slow (a
fifth of a step at 2,048 tokens of room for 120). So the room grows and shrinks with the longest
text: by doubling, so that what is copied is a few bytes for each one written. It is never a power
of two, for then all rows would meet in the same lines of the processor's cache.

Address space is reserved for rows of full length and becomes memory as it is written. The first
rows lie in huge pages and keep their memory when they are given up, as far as the caller allows:
most steps find their rows there, where nothing has to be cleared and few addresses looked up.

Shapes: R rows, KV key heads, C tokens of room in a row, D values of a head.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .huge_pages import HUGE_PAGE
from .protocol import IntArray

__all__ = ["GraphCache"]

Floats = npt.NDArray[np.float32]

_LEAST_ROOM = 128
_ODD_ROOM = 16


class GraphCache:
    """Keys and values of every layer, [R, KV, C, D] each."""

    def __init__(
        self,
        num_tensors: int,
        shape: tuple[int, int, int, int],
        *,
        is_growing: bool = False,
        num_kept: int = 0,
    ) -> None:
        """Reserve `num_tensors` tensors of at most `shape`; what was never written is zero.

        Args:
            num_tensors: Keys and values of each layer.
            shape: [R, KV, C, D] of each.
            is_growing: Whether rows begin with little room, and `fit` is called before tokens are
                added; else they have all of it.
            num_kept: Tokens that the first rows may hold memory for when they are nobody's.

        Raises `ConfigError` where so much address space is not to be had.
        """
        size = 4 * int(np.prod(shape))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._memory = [mmap.mmap(-1, size, flags=flags) for _ in range(num_tensors)]
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"{num_tensors} caches of {size} bytes cannot be reserved ({error}): give the "
                "engine a shorter context or a smaller KV cache"
            ) from error
        self._num_rows, self._num_heads, self._most, self._head_dim = shape
        kept = min(size, 4 * num_kept * self._num_heads * self._head_dim)
        self._kept_bytes = kept // HUGE_PAGE * HUGE_PAGE
        if self._kept_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
            for memory in self._memory:
                memory.madvise(mmap.MADV_HUGEPAGE, 0, self._kept_bytes)
        room = self._room_for(0) if is_growing else self._most
        self.tensors: list[Floats] = [self._view(index, room) for index in range(num_tensors)]

    @property
    def room(self) -> int:
        """Tokens that a row can hold now."""
        room: int = self.tensors[0].shape[2]
        return room

    def fit(self, lengths: IntArray) -> None:
        """Give rows the room that their `lengths` [R] ask for; 0: nobody's row, and forgotten.

        Nothing moves unless the longest row has no room, or has four times what it needs.
        """
        needed = int(lengths.max())
        if needed <= self.room <= self._room_for(2 * needed):
            return
        live = np.flatnonzero(lengths).tolist()
        stored = np.minimum(lengths, self.room)
        room = self._room_for(needed)
        for index, tensor in enumerate(self.tensors):
            kept = [tensor[row, :, : stored[row]].copy() for row in live]
            self._free(self._memory[index], 0, tensor.nbytes + mmap.PAGESIZE - 1)
            self.tensors[index] = tensor = self._view(index, room)
            for row, values in zip(live, kept, strict=True):
                tensor[row, :, : values.shape[1]] = values

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of one row to another."""
        for tensor in self.tensors:
            tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def forget(self, row: int) -> None:
        """Give the memory of a row back to the system, whole pages of it, or keep it for the next
        one: then what it held stays to be overwritten."""
        row_bytes = self.tensors[0][0].nbytes
        for memory in self._memory:
            self._free(memory, row * row_bytes, (row + 1) * row_bytes)

    def swap(self, one: int, other: int, num_tokens: int) -> None:
        """Exchange the first tokens of two rows."""
        for tensor in self.tensors:
            kept = tensor[one, :, :num_tokens].copy()
            tensor[one, :, :num_tokens] = tensor[other, :, :num_tokens]
            tensor[other, :, :num_tokens] = kept

    def _free(self, memory: mmap.mmap, start: int, stop: int) -> None:
        """Whole pages of bytes `start`..`stop - 1` but those that are kept."""
        page = mmap.PAGESIZE
        start = max(-(-start // page) * page, self._kept_bytes)
        stop = stop // page * page
        if stop > start:
            memory.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _room_for(self, num_tokens: int) -> int:
        room = _LEAST_ROOM
        while room + _ODD_ROOM < num_tokens:
            room *= 2
        return min(room + _ODD_ROOM, self._most)

    def _view(self, index: int, room: int) -> Floats:
        shape = (self._num_rows, self._num_heads, room, self._head_dim)
        flat = np.frombuffer(self._memory[index], np.float32, count=int(np.prod(shape)))
        return flat.reshape(shape)
