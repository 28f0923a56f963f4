"""Whether a document reads like language, by signs that hold in every script.

Counts, not words: no list of stop words, no length of words, no classifier, so that nothing is
dropped for the language it is in. The rules are those of Gopher (Rae et al., arXiv:2112.11446,
appendix A.1.1) that need no words, and compressibility in place of the others: language, of
whatever script, shrinks to between a tenth and two thirds under zlib; lists and loops shrink more,
keys and encoded data less.
"""

from __future__ import annotations

import unicodedata
import zlib

__all__ = ["REASONS", "quality_fault"]

REASONS = ("too short", "few letters", "repeated lines", "repetitive", "random")
"""What `quality_fault` may answer."""

MIN_LETTERS = 20
MIN_LETTER_SHARE = 0.6
"""Letters and their marks among all characters that are not white space."""
MAX_REPEATED_LINE_SHARE = 0.3
"""Characters in lines that stood before in the document, among those of all lines."""
MIN_COMPRESSED_BYTES = 1000
"""A shorter document is not judged by how it compresses."""
MAX_COMPRESSION = 10.0
MIN_COMPRESSION = 1.45


def quality_fault(document: str) -> str | None:
    """The first of `REASONS` for which `document` is no text to learn from; None: it is one."""
    letters = sum(map(_is_letter, document))
    visible = sum(not char.isspace() for char in document)
    if letters < MIN_LETTERS:
        return "too short"
    if letters < MIN_LETTER_SHARE * visible:
        return "few letters"
    if _repeated_line_share(document) > MAX_REPEATED_LINE_SHARE:
        return "repeated lines"
    return _compression_fault(document.encode())


def _is_letter(char: str) -> bool:
    # Vowel signs and accents of many scripts are marks, and no letters to `isalpha`.
    return char.isalpha() or (not char.isascii() and unicodedata.category(char)[0] == "M")


def _repeated_line_share(document: str) -> float:
    lines = [line.strip() for line in document.split("\n") if line.strip()]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def _compression_fault(data: bytes) -> str | None:
    if len(data) < MIN_COMPRESSED_BYTES:
        return None
    ratio = len(data) / len(zlib.compress(data, 6))
    if ratio > MAX_COMPRESSION:
        return "repetitive"
    return "random" if ratio < MIN_COMPRESSION else None
