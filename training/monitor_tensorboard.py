"""TensorBoard's event files, written as they are defined; TensorBoard itself is not needed.

A file is a sequence of records: the length of an event (8 bytes, little-endian), a masked CRC-32C
of those, the event, a masked CRC-32C of it (TFRecord). An event is a protocol buffer of which four
fields are used: wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5;
and session_log = 7 at the start of a resumed run, upon which a reader drops the events of that step
and later ones. A summary holds values of tag = 1 and simple_value = 2 (float).
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmserve.durable import append_bytes

__all__ = ["EventFile", "flatten"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SESSION_START = 1


class EventFile:
    """One process's event file; several of a run, in the order of their names, are one log."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Begin a file; events of `first_step` and later in earlier files no longer count."""
        folder.mkdir(exist_ok=True)
        number = 1 + max(map(_number_of, folder.glob("events.out.tfevents.*")), default=0)
        path = folder / f"events.out.tfevents.{number:06d}.{os.getpid()}"
        self._file = path.open("ab")
        self._append(_text(3, "brain.Event:2"))
        if number > 1:
            start = _field(1, _VARINT) + _varint(_SESSION_START)
            self._append(_field(2, _VARINT) + _varint(first_step) + _message(7, start))

    def write(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a log's line as scalars of its step."""
        values = b"".join(
            _message(1, _text(1, tag) + _field(2, _FIXED32) + struct.pack("<f", value))
            for tag, value in flatten(line)
            if tag != "step"
        )
        self._append(_field(2, _VARINT) + _varint(line["step"]) + _message(5, values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: bytes) -> None:
        event = _field(1, _FIXED64) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        append_bytes(self._file, length + _masked_crc(length) + event + _masked_crc(event))


def flatten(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line of the log, with `name/inner` for those of each layer."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in value.items())
        elif isinstance(value, int | float):
            yield name, value


def _number_of(path: Path) -> int:
    number = path.name.split(".")[3]
    return int(number) if number.isdecimal() else 0


def _field(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _message(number: int, content: bytes) -> bytes:
    return _field(number, _BYTES) + _varint(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _crc_table() -> list[int]:
    """CRC-32C (Castagnoli), bits reversed, of each byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    masked = (crc >> 15 | crc << 17) + 0xA282EAD8
    return struct.pack("<I", masked & 0xFFFFFFFF)
