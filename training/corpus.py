"""Training text: read from files, cut into documents, and split into trained-on and held-out.

Sources are files, folders (their .txt, .md and .jsonl files, in order of name), glob patterns and
`-` for standard input. Text is UTF-8; a file that is not is refused with the place of the first
bad byte, since a corpus that was silently repaired teaches the repair. A `.jsonl` file holds one
object a line with a string `text`, each a document.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmserve.errors import DataError
from llmserve.text.cleaning import clean_text

__all__ = ["Corpus", "documents_sha256", "read_corpus"]

SUFFIXES = (".jsonl", ".md", ".txt")
BLOCK_CHARS = 2000
"""A file without a separator is cut at the first empty line after this many characters."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents to train on and documents held out, none in both."""

    train: list[str]
    held_out: list[str]

    @property
    def sha256(self) -> str:
        """Digest of all documents and of how they are split."""
        halves = documents_sha256(self.train) + documents_sha256(self.held_out)
        return hashlib.sha256(halves.encode()).hexdigest()


def documents_sha256(documents: Iterable[str]) -> str:
    """Digest of the documents, their order and their boundaries."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read_corpus(
    sources: Sequence[str],
    *,
    separator: str = "",
    held_out: float = 0.05,
    held_out_by: Literal["document", "tail"] = "document",
    seed: int = 0,
) -> Corpus:
    """Read, clean and split the text of `sources`.

    By "document", each is held out or not by a hash of its text and `seed`, so that two equal
    documents are never on both sides; by "tail", the last share `held_out` of all characters is.

    Raises:
        DataError: a source that is missing, not UTF-8 or not JSONL; no text; nothing held out.
    """
    documents: list[str] = []
    for name, data in _read_sources(sources):
        text = _decode(name, data)
        parts = _json_documents(name, text) if name.endswith(".jsonl") else [text]
        for part in parts:
            documents += _split(part, separator, in_blocks=held_out_by == "document")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"no text in {', '.join(sources)}")
    corpus = (
        _split_tail(documents, held_out)
        if held_out_by == "tail"
        else _split_by_hash(documents, held_out, seed)
    )
    if not corpus.train or not corpus.held_out:
        raise DataError(
            f"too little text: {len(documents)} documents cannot be split into text to train on "
            f"and {held_out:.0%} to hold out; give more text, or hold out by 'tail'"
        )
    return corpus


def _read_sources(sources: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for source in sources:
        if source == "-":
            yield "standard input", sys.stdin.buffer.read()
            continue
        for path in _paths(source):
            try:
                yield str(path), path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _paths(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True)]
        found = [p for p in found if p.is_file()]
    if not found:
        kinds = f" with {', '.join(SUFFIXES)} files in it" if path.is_dir() else ""
        raise DataError(f"no such text: {source} is no file, folder{kinds} or pattern that matches")
    return sorted(found)


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert the file first"
        ) from error


def _json_documents(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}: line {number} is not JSON: {error}") from error
        document = value.get("text") if isinstance(value, dict) else None
        if not isinstance(document, str):
            raise DataError(f"{name}: line {number} is no object with a string 'text'")
        yield document


def _split(text: str, separator: str, *, in_blocks: bool) -> list[str]:
    """The cleaned documents of one text: between separators, or in blocks, or the whole."""
    if separator:
        parts = text.replace("\r\n", "\n").split(separator)
        return [clean_text(part) for part in parts]
    text = clean_text(text)
    return list(_blocks(text)) if in_blocks else [text]


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + BLOCK_CHARS)
        end = len(text) if cut < 0 else cut + 2
        yield text[start:end]
        start = end


def _split_by_hash(documents: list[str], share: float, seed: int) -> Corpus:
    train: list[str] = []
    held_out: list[str] = []
    for document in documents:
        digest = hashlib.sha256(f"{seed}\n{document}".encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        (held_out if fraction < share else train).append(document)
    return Corpus(train, held_out)


def _split_tail(documents: list[str], share: float) -> Corpus:
    """Cut the concatenation of all documents once; the one cut through is in both, in parts."""
    remaining = int(sum(map(len, documents)) * (1 - share))
    train: list[str] = []
    held_out: list[str] = []
    for document in documents:
        if remaining > 0:
            train.append(document[:remaining])
        if len(document) > remaining:
            held_out.append(document[max(remaining, 0) :])
        remaining -= len(document)
    return Corpus(train, held_out)
