"""Spans of a text that answer a question, from the scores of each token as a start and as an end.

A span's probability is that of its start times that of its end, each over all tokens of the text
(Devlin et al. 2018, arXiv:1810.04805, section 4.2).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmserve.text.tokenizer import Tokenizer

__all__ = ["Span", "best_spans", "spelled"]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `first`..`last` of a text."""

    first: int
    last: int
    probability: float


def best_spans(scores: Sequence[Sequence[float]], *, count: int, max_tokens: int) -> list[Span]:
    """The likeliest spans of at most `max_tokens` tokens, best first. O(tokens * max_tokens).

    `scores` are [tokens, 2], finite: as a start, as an end.
    """
    starts = _log_softmax([start for start, _ in scores])
    ends = _log_softmax([end for _, end in scores])

    def spans() -> Iterator[tuple[float, int, int]]:
        for first, start in enumerate(starts):
            for last in range(first, min(first + max_tokens, len(ends))):
                yield start + ends[last], -first, -last

    best = heapq.nlargest(count, spans())
    return [Span(-first, -last, math.exp(logprob)) for logprob, first, last in best]


def spelled(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ids, and its length before each of them and after the last."""
    stream = tokenizer.open_stream()
    text, ends = "", [0]
    for token_id in token_ids:
        for token in tokenizer.text_tokens([token_id], skip_special_tokens=False):
            text += stream.push(token)
        ends.append(len(text))
    text += stream.flush()
    ends[-1] = len(text)
    return text, ends


def _log_softmax(scores: Sequence[float]) -> list[float]:
    largest = max(scores)
    total = math.log(math.fsum(math.exp(score - largest) for score in scores))
    return [score - largest - total for score in scores]
