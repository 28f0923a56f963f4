"""Reading a GGUF file of the types that are written here: values of its header, tensors by name.

Nothing in the file is believed before it is checked. Tensors are mapped, and decoded one at a time.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.errors import CheckpointError
from llmserve.quant.dtypes import Float32Array

from .gguf_blocks import TENSOR_TYPES, BlockType, decode, rounding_error
from .gguf_file import ALIGNMENT, ARRAY, STRING, VERSION

__all__ = ["GgufFile"]

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_KINDS: dict[int, BlockType] = {entry.code: kind for kind, entry in TENSOR_TYPES.items()}
_MAX_RANK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A tensor of the directory."""

    shape: tuple[int, ...]
    kind: BlockType
    offset: int
    """Of the first byte, from the start of the data."""

    @property
    def num_bytes(self) -> int:
        return TENSOR_TYPES[self.kind].num_bytes(self.shape)


class GgufFile:
    """An open file, which must not be changed meanwhile."""

    def __init__(self, path: Path) -> None:
        """Read the header and the directory.

        Raises `CheckpointError` for a file that is damaged or holds types that are not known here.
        """
        self._path = path
        try:
            self._data: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        self.metadata: dict[str, Any] = {}
        """The header's values by key."""
        self._entries: dict[str, _Entry] = {}
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise self._damaged(f"header ends or breaks at byte {self._at}") from error
        self._start = -(-self._at // ALIGNMENT) * ALIGNMENT
        self._check_entries()

    def names(self) -> list[str]:
        """Of all tensors, in the file's order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Extents of a tensor, the innermost axis last."""
        return self._entry(name).shape

    def hashes(self) -> dict[str, str]:
        """Tensor → sha256 of type, shape and bytes."""
        return {name: self._hash(name) for name in self._entries}

    def float32(self, name: str) -> Float32Array:
        """A tensor as float32. Raises `CheckpointError` for a name that the file does not have."""
        entry = self._entry(name)
        return decode(self._bytes(entry), entry.kind)[0].reshape(entry.shape)

    def with_error(self, name: str) -> tuple[Float32Array, Float32Array]:
        """A tensor as float32, and how far each number may be from what it was rounded from."""
        entry = self._entry(name)
        values, scales = decode(self._bytes(entry), entry.kind)
        error = rounding_error(values, scales, entry.kind)
        return values.reshape(entry.shape), error.reshape(entry.shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise self._damaged(f"no tensor {name}")
        return self._entries[name]

    def _bytes(self, entry: _Entry) -> npt.NDArray[np.uint8]:
        first = self._start + entry.offset
        return self._data[first : first + entry.num_bytes]

    def _hash(self, name: str) -> str:
        entry = self._entries[name]
        digest = hashlib.sha256(f"{entry.kind}{list(entry.shape)}".encode())
        digest.update(self._bytes(entry).data)
        return digest.hexdigest()

    def _read_header(self) -> None:
        magic, version = bytes(self._data[:4]), int(self._take("xxxxI"))
        if magic != b"GGUF" or version != VERSION:
            raise self._damaged(f"magic {magic!r}, version {version}; expected GGUF, {VERSION}")
        num_tensors, num_values = self._take("Q"), self._take("Q")
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._take("I"))
        for _ in range(num_tensors):
            name = self._string()
            self._entries[name] = self._directory_entry()

    def _directory_entry(self) -> _Entry:
        rank = self._take("I")
        if rank > _MAX_RANK:
            raise self._damaged(f"a tensor of {rank} axes")
        shape = tuple(self._take("Q") for _ in range(rank))[::-1]
        code = self._take("I")
        if code not in _KINDS:
            raise self._damaged(f"type {code}; read are {', '.join(TENSOR_TYPES)}")
        return _Entry(shape=shape, kind=_KINDS[code], offset=self._take("Q"))

    def _check_entries(self) -> None:
        size = len(self._data) - self._start
        for name, entry in self._entries.items():
            is_whole = math.prod(entry.shape) % TENSOR_TYPES[entry.kind].block_size == 0
            if not is_whole or entry.offset + entry.num_bytes > size:
                raise self._damaged(f"tensor {name} does not lie in the file")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._take(_SCALARS[kind])
        item, count = self._take("I"), self._take("Q")
        if item == ARRAY or count > len(self._data):
            raise self._damaged("an array of arrays, or longer than the file")
        return [self._value(item) for _ in range(count)]

    def _string(self) -> str:
        length = self._take("Q")
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode()

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self._data.data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return value

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}")
