"""What a tokenizer makes of a text it was not trained on: how short, how whole, how fast.

A token is a byte's spelling when it stands for one byte that is no character, or is named like one
(`<0xE2>`): what a vocabulary falls back to for what it does not hold. Bytes are counted, not
characters, so that languages and tokenizers can be compared.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.text.tokenizer import Tokenizer

__all__ = ["ADVERSARIAL_CHARS", "TokenizerFigures", "adversarial_texts", "measure_tokenizer"]

ADVERSARIAL_CHARS = 200_000
"""Length of each text that is made to be slow."""

_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
_WORD = re.compile(r"[^\W\d_]+")
_UNITS = (
    *("a", "ab", " ", "\t\n", ".", "1", "<0x41>", "<|endoftext|>"),
    *("\u0301", "\u200d", "\u4e00\u5a01", "\U0001f600", "\U0010ffff", "e\u0301 x\0\u4e00"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFigures:
    """Figures of one tokenizer on one text."""

    vocab_size: int
    bytes_per_token: float
    """UTF-8 bytes of the text for each of its tokens: how much it is shortened."""
    whole_words: float
    """Share of the words that are a single token, with the space before them or without."""
    coverage: float
    """Share of the bytes that no byte's spelling was needed for."""
    encode_mb_per_s: float
    """10^6 bytes of the text encoded in a CPU second, as one text; the best of three passes."""
    adversarial_s: float
    """CPU seconds for 200,000 characters of the slowest text of `adversarial_texts`."""
    is_lossless: bool
    """Whether the text and every adversarial one came back exactly."""


def measure_tokenizer(tokenizer: Tokenizer, documents: Sequence[str]) -> TokenizerFigures:
    """Encode and decode `documents` and the adversarial texts. Some seconds.

    Raises `RequestError` for a text that the tokenizer cannot take.
    """
    encoded = [tokenizer.encode(document, add_special_tokens=False) for document in documents]
    ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in encoded])
    lengths, is_spelling = _tables(tokenizer)
    num_bytes = sum(len(document.encode()) for document in documents)
    words = [_count_words(text, lengths[one]) for text, one in zip(documents, encoded, strict=True)]
    whole, total = np.sum(words, axis=0).tolist()
    adversarial_s, is_lossless = _adversarial(tokenizer)
    return TokenizerFigures(
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=num_bytes / max(1, len(ids)),
        whole_words=whole / max(1, total),
        coverage=1 - float(lengths[ids][is_spelling[ids]].sum()) / max(1, num_bytes),
        encode_mb_per_s=num_bytes / 1e6 / _encode_seconds(tokenizer, documents),
        adversarial_s=adversarial_s,
        is_lossless=is_lossless and all(_comes_back(tokenizer, text) for text in documents),
    )


def adversarial_texts(num_chars: int) -> list[str]:
    """Texts without anything that a tokenizer could cut at, or with nothing else."""
    return [(unit * (num_chars // len(unit) + 1))[:num_chars] for unit in _UNITS]


def _tables(tokenizer: Tokenizer) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """For every id: bytes of its text, and whether it spells a byte."""
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    is_spelling = np.zeros(tokenizer.vocab_size, bool)
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        lengths[token_id] = len(data)
        [name] = list(tokenizer.text_tokens([token_id], skip_special_tokens=False)) or [""]
        is_part = len(data) == 1 and data[0] >= 0x80
        is_spelling[token_id] = is_part or _BYTE_NAME.fullmatch(name) is not None
    return lengths, is_spelling


def _count_words(text: str, token_lengths: npt.NDArray[Any]) -> tuple[int, int]:
    """Words that are a single token, and all words. A word is a run of letters."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)  # bytes of a character
    offsets = np.concatenate([[0], np.cumsum(widths)])
    spans = np.array([match.span() for match in _WORD.finditer(text)], np.int64).reshape(-1, 2)
    begins, ends = offsets[spans[:, 0]], offsets[spans[:, 1]]
    # The token that a word's first byte lies in must end with it, and may begin a space before.
    token_ends = np.cumsum(token_lengths)
    token = np.searchsorted(token_ends, begins, side="right")
    token_begins = token_ends[token] - token_lengths[token]
    is_whole = (token_ends[token] == ends) & (begins - token_begins <= 1)
    return int(is_whole.sum()), len(spans)


def _encode_seconds(tokenizer: Tokenizer, documents: Sequence[str]) -> float:
    """CPU time, so that it is the same on a busy machine."""
    text = "\n".join(documents)
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        tokenizer.encode(text)
        best = min(best, time.process_time() - began)
    return best


def _adversarial(tokenizer: Tokenizer) -> tuple[float, bool]:
    """CPU seconds of the slowest text, and whether all came back."""
    slowest, is_lossless = 0.0, True
    for text in adversarial_texts(ADVERSARIAL_CHARS):
        began = time.process_time()
        tokenizer.encode(text)
        slowest = max(slowest, time.process_time() - began)
    for text in adversarial_texts(2000):
        is_lossless = is_lossless and _comes_back(tokenizer, text)
    return slowest, is_lossless


def _comes_back(tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=False) == text
