"""The texts of sources, one by one: files, folders, glob patterns, standard input.

By suffix, a file is a Parquet table (`.parquet`: one text in each row), JSON lines (`.jsonl`: one
in each line) or plain text (anything else: the whole file, or pieces of it, `data_pieces.py`). Text
is UTF-8; whatever is not text is refused with its place, since a corpus that was silently repaired
teaches the repair. All are read as they are consumed, never as a whole.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmserve.errors import DataError

from .data_pieces import read_pieces

__all__ = ["SUFFIXES", "SourceFile", "SourceReader", "SourceText", "file_sha256s"]

SUFFIXES = (".jsonl", ".md", ".parquet", ".txt")
"""Files of a folder that are read."""
MAX_LINE_BYTES = 64 << 20
"""Longest line of a JSON lines file: a larger one is some other file."""

_STANDARD_INPUT = "standard input"
_ENCODINGS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"(\xb5/\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "Parquet",
    b"%PDF": "PDF",
}
"""What a file that is no text begins with, where that says what it is."""


@dataclass(frozen=True, slots=True)
class SourceText:
    """One text."""

    text: str
    is_document: bool
    """Whether it is one document: a line or row; a plain text may hold several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file that was read to its end."""

    name: str
    """Its path inside the folder that was given, or its name alone."""
    bytes: int
    """Its size."""
    sha256: str
    """Digest of its bytes."""


class SourceReader:
    """Reads the texts of sources in order, and keeps a record of the files."""

    def __init__(
        self, sources: Sequence[str], *, text_field: str = "text", separator: str = ""
    ) -> None:
        """Read `sources` in order.

        Args:
            sources: Files, folders, patterns, `-`.
            text_field: Field of a JSON line, or column of a table, that is the text.
            separator: What stands between the documents of a plain text: where it may be cut.
        """
        self.files: list[SourceFile] = []
        """Those read so far."""
        self._sources = sources
        self._field, self._separator = text_field, separator

    def texts(self) -> Iterator[SourceText]:
        """Every text. Folders and patterns are read in order of name.

        Raises:
            DataError: a source is missing or unreadable, no UTF-8, binary, or a line or row of it
                has no text in the field.
            MissingDependencyError: a Parquet file, without pyarrow.
        """
        for source in self._sources:
            if source == "-":
                yield from self._plain(sys.stdin.buffer, _STANDARD_INPUT, _STANDARD_INPUT)
                continue
            for path, name in _paths(source):
                try:
                    yield from self._file(path, name)
                except OSError as error:
                    raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _file(self, path: Path, name: str) -> Iterator[SourceText]:
        if path.suffix == ".parquet":
            yield from (SourceText(text, is_document=True) for text in self._table(path, name))
        elif path.suffix == ".jsonl":
            yield from (SourceText(text, is_document=True) for text in self._lines(path, name))
        else:
            with open(path, "rb") as file:
                yield from self._plain(file, str(path), name)

    def _plain(self, file: BinaryIO, where: str, name: str) -> Iterator[SourceText]:
        digest, size = hashlib.sha256(), 0

        def read(most: int) -> bytes:
            nonlocal size
            data = file.read(most)
            digest.update(data)
            size += len(data)
            return data

        for offset, data in read_pieces(read, self._separator):
            yield SourceText(_decode(where, data, offset=offset), is_document=False)
        self._note(name, size, digest.hexdigest())

    def _table(self, path: Path, name: str) -> Iterator[str]:
        from .data_parquet import parquet_texts

        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            self._note(name, file.tell(), digest.hexdigest())
        yield from parquet_texts(path, self._field)

    def _lines(self, path: Path, name: str) -> Iterator[str]:
        digest = hashlib.sha256()
        size = 0
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                digest.update(line)
                text = self._line_text(f"{path}: line {number}", line, offset=size)
                size += len(line)
                if text is not None:
                    yield text
        self._note(name, size, digest.hexdigest())

    def _line_text(self, where: str, data: bytes, *, offset: int) -> str | None:
        """The text of one JSON line, which begins at `offset`; None for an empty line."""
        if len(data) > MAX_LINE_BYTES:
            raise DataError(
                f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB; a .jsonl file holds one "
                "document in each line"
            )
        line = _decode(where, data, offset=offset)
        if not line.strip():
            return None
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        text = value.get(self._field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{where} {self._missing(value)}")
        _check_characters(where, text)
        return text

    def _missing(self, value: Any) -> str:
        problem = f"is no object with a string {self._field!r}"
        if not isinstance(value, dict):
            return problem
        strings = sorted(name for name, content in value.items() if isinstance(content, str))
        return f"{problem}; its strings are {strings[:8]}: choose one with --text-field"

    def _note(self, name: str, size: int, sha256: str) -> None:
        self.files.append(SourceFile(name=name, bytes=size, sha256=sha256))


def file_sha256s(sources: Sequence[str]) -> set[str]:
    """Digests of the files of `sources`, whatever is in them.

    Raises:
        DataError: one is missing or unreadable.
    """
    digests = set()
    for path in [path for source in sources for path, _ in _paths(source)]:
        try:
            with open(path, "rb") as file:
                digests.add(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return digests


def _paths(source: str) -> list[tuple[Path, str]]:
    """The files of a source in order, each with the name it is recorded under."""
    path = Path(source)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
        found = [(p, p.relative_to(path).as_posix()) for p in files]
    elif path.is_file() or path.is_fifo():
        found = [(path, path.name)]
    else:
        files = [Path(name) for name in glob.glob(source, recursive=True)]
        found = [(p, p.name) for p in files if p.is_file()]
    if not found:
        kinds = f" with {', '.join(SUFFIXES)} files in it" if path.is_dir() else ""
        raise DataError(f"no such text: {source} is no file, folder{kinds} or pattern that matches")
    return sorted(found)


def _decode(where: str, data: bytes, *, offset: int = 0) -> str:
    """`data`, which begins `offset` bytes into the file, as text."""
    try:
        text = data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        # A byte order mark is not counted by the decoder.
        place = offset + data.index(error.object[error.start :])
        raise DataError(
            f"{where}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
            f"{place}{_guess(data, offset)}; convert the file first"
        ) from error
    if "\0" in text:
        raise DataError(
            f"{where}: a binary file: zero byte at offset {offset + data.index(0)}"
            f"{_guess(data, offset)}; give text, .jsonl or .parquet"
        )
    return text


def _guess(data: bytes, offset: int) -> str:
    known = [name for start, name in _ENCODINGS.items() if not offset and data.startswith(start)]
    return f" (it looks like {known[0]})" if known else ""


def _check_characters(where: str, text: str) -> None:
    """Raise for a surrogate, which a JSON escape can hold and UTF-8 cannot."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds the surrogate {text[error.start]!a}, which is no character"
        ) from error
