"""GGUF files: a header of named values, a directory of tensors, and their data, aligned.

Source: the format's description, docs/gguf.md in github.com/ggml-org/ggml, version 3. Numbers are
little-endian; the directory lists a tensor's extents from the innermost axis outwards.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmserve.durable import write_synced

from .gguf_blocks import TENSOR_TYPES, BlockType

__all__ = ["ALIGNMENT", "ARRAY", "STRING", "VERSION", "GgufTensor", "GgufValue", "write_gguf"]

GgufValue = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
"""A value of the header: whole numbers are uint32, in a list int32; fractions are float32."""

VERSION = 3
"""Of the format."""
ALIGNMENT = 32
"""Bytes; the format's default, so that no value of the header is needed for it."""
STRING = 8
"""Type of a value: a text."""
ARRAY = 9
"""Type of a value: a list of one type."""

_UINT32, _INT32, _FLOAT32, _BOOL = 4, 5, 6, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of the directory; its data are made when they are written."""

    name: str
    shape: tuple[int, ...]
    """Extents as numpy has them, the innermost axis last."""
    kind: BlockType
    """How the numbers are stored."""
    chunks: Callable[[], Iterable[bytes]]
    """Makes the stored bytes, in order."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return TENSOR_TYPES[self.kind].num_bytes(self.shape)


def write_gguf(
    path: Path, metadata: Mapping[str, GgufValue], tensors: Sequence[GgufTensor]
) -> None:
    """Write the new file `path` (`durable.staged_file`), one tensor's chunk in memory at a time.

    Raises `OSError`, and whatever making the data raises.
    """
    write_synced(path, _content(metadata, tensors))


def _content(metadata: Mapping[str, GgufValue], tensors: Sequence[GgufTensor]) -> Iterator[bytes]:
    header = _header(metadata, tensors)
    yield header + _padding(len(header))
    for tensor in tensors:
        length = 0
        for chunk in tensor.chunks():
            length += len(chunk)
            yield chunk
        assert length == tensor.num_bytes, f"{tensor.name} has another size than its entry says"
        yield _padding(length)


def _header(metadata: Mapping[str, GgufValue], tensors: Sequence[GgufTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += (_string(key) + _tagged(value) for key, value in metadata.items())
    offset = 0
    for tensor in tensors:
        parts.append(_entry(tensor, offset))
        offset += tensor.num_bytes + len(_padding(tensor.num_bytes))
    return b"".join(parts)


def _entry(tensor: GgufTensor, offset: int) -> bytes:
    rank = len(tensor.shape)
    return _string(tensor.name) + struct.pack(
        f"<I{rank}QIQ", rank, *tensor.shape[::-1], TENSOR_TYPES[tensor.kind].code, offset
    )


def _tagged(value: GgufValue) -> bytes:
    """A value behind the number of its type."""
    if isinstance(value, str | bool | int | float):
        kind = _type_of(value)
        return struct.pack("<I", kind) + _plain(kind, value)
    kind = _type_of(value[0]) if value else STRING
    kind = _INT32 if kind == _UINT32 else kind
    items = b"".join(_plain(kind, item) for item in value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + items


def _type_of(value: str | bool | int | float) -> int:
    if isinstance(value, str):
        return STRING
    if isinstance(value, bool):
        return _BOOL
    return _UINT32 if isinstance(value, int) else _FLOAT32


def _plain(kind: int, value: str | int | float) -> bytes:
    if isinstance(value, str):
        return _string(value)
    return struct.pack({_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?"}[kind], value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(length: int) -> bytes:
    return bytes(-length % ALIGNMENT)
