"""Training text: read, cleaned, cut into documents, and split into trained-on and held-out.

A document is what lies between two separators, a line of JSON lines, a row of a table; a plain text
without separators is cut at empty lines into blocks, so that there is something to hold out. The
split comes last: what is dropped as a duplicate is on neither side.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llmserve.errors import DataError

from .clean_pipeline import Cleaner
from .clean_report import CleaningReport
from .clean_steps import DEFAULT_STEPS, parse_steps
from .data_sources import SourceFile, SourceReader
from .document_store import ChosenDocuments, DocumentStore

__all__ = ["Corpus", "Documents", "documents_sha256", "read_corpus", "read_documents"]

BLOCK_CHARS = 2000
"""A file without a separator is cut at the first empty line after this many characters."""
MAX_BLOCK_CHARS = 8000
"""Where no empty line comes before this many, it is cut at the next line end."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents of some sources, cleaned."""

    texts: Sequence[str]
    """They lie on disk, and are read as they are asked for."""
    files: list[SourceFile]
    """Where they come from."""
    cleaning: CleaningReport
    """What was taken away."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents to train on and documents held out, none in both."""

    train: Sequence[str]
    held_out: Sequence[str]
    files: list[SourceFile]
    """Where they come from."""
    cleaning: CleaningReport
    """What was taken away."""

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


def read_documents(
    sources: Sequence[str],
    *,
    separator: str = "",
    text_field: str = "text",
    cleaning: str = DEFAULT_STEPS,
    in_blocks: bool = True,
) -> Documents:
    """Read and clean the documents of `sources`.

    Args:
        sources: Files, folders, patterns, `-` (`data_sources.py`).
        separator: Text between two documents of a plain text; empty: there is none.
        text_field: Field of JSON lines, or column of tables, that holds the text.
        cleaning: Steps (`clean_steps.parse_steps`).
        in_blocks: Cut a text without separators at empty lines after about 2000 characters.

    Raises:
        ConfigError: an unknown step.
        DataError: a source that is missing or no text; no text is left.
        MissingDependencyError: a Parquet file, without pyarrow.
    """
    cleaner = Cleaner(parse_steps(cleaning))
    reader = SourceReader(sources, text_field=text_field, separator=separator)
    store = DocumentStore()
    for source in reader.texts():
        if source.is_document:
            store.append(cleaner.clean(source.text))
            continue
        for document in _cut(source.text, separator, cleaner, in_blocks=in_blocks):
            store.append(document)
    documents = cleaner.select(store)
    if not documents:
        took = f": {cleaner.report.summary()}" if cleaner.report.characters_before else ""
        raise DataError(f"no text in {', '.join(sources)}{took}")
    return Documents(documents, reader.files, cleaner.report)


def read_corpus(
    sources: Sequence[str],
    *,
    separator: str = "",
    text_field: str = "text",
    cleaning: str = DEFAULT_STEPS,
    held_out: float = 0.05,
    held_out_by: Literal["document", "tail"] = "document",
    seed: int = 0,
) -> Corpus:
    """Read, clean and split the text of `sources`.

    By "document", each is held out or not by a hash of its text and `seed`, so that two equal
    documents are never on both sides; by "tail", the last share `held_out` of all characters is.

    Raises:
        ConfigError, DataError, MissingDependencyError: as `read_documents` says; or nothing would
            be held out.
    """
    found = read_documents(
        sources,
        separator=separator,
        text_field=text_field,
        cleaning=cleaning,
        in_blocks=held_out_by == "document",
    )
    if held_out_by == "tail":
        train, rest = _split_tail(found.texts, held_out)
    else:
        train, rest = _split_by_hash(found.texts, held_out, seed)
    if not train or not rest:
        raise DataError(
            f"too little text: {len(found.texts)} documents cannot be split into text to train on "
            f"and {held_out:.0%} to hold out; give more text, or hold out by 'tail'"
        )
    return Corpus(train, rest, found.files, found.cleaning)


def _cut(text: str, separator: str, cleaner: Cleaner, *, in_blocks: bool) -> Iterator[str]:
    """The cleaned documents of one text: between separators, or in blocks, or the whole."""
    if separator:
        parts = text.replace("\r\n", "\n").split(separator)
        return map(cleaner.clean, parts)
    text = cleaner.clean(text)
    return _blocks(text) if in_blocks else iter([text])


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        least, most = start + BLOCK_CHARS, start + MAX_BLOCK_CHARS
        cut = text.find("\n\n", least, most) + 2
        if cut < 2:  # no empty line for so long: any line end will do
            cut = text.find("\n", most) + 1 or len(text)
        yield text[start:cut]
        start = cut


def _split_by_hash(
    documents: Sequence[str], share: float, seed: int
) -> tuple[Sequence[str], Sequence[str]]:
    train, held_out = array("q"), array("q")
    for index, document in enumerate(documents):
        digest = hashlib.sha256(f"{seed}\n{document}".encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        (held_out if fraction < share else train).append(index)
    return ChosenDocuments(documents, train), ChosenDocuments(documents, held_out)


def _split_tail(documents: Sequence[str], share: float) -> tuple[Sequence[str], Sequence[str]]:
    """Cut the concatenation of all documents once; the one cut through is in both, in parts."""
    remaining = int(sum(map(len, documents)) * (1 - share))
    train, held_out = DocumentStore(), DocumentStore()
    for document in documents:
        if remaining > 0:
            train.append(document[:remaining])
        if len(document) > remaining:
            held_out.append(document[max(remaining, 0) :])
        remaining -= len(document)
    return train, held_out
