"""Log-probabilities in the two shapes of OpenAI's API, and the prompt's in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmserve.output import TextDelta
from llmserve.runners.protocol import TokenLogprobs
from llmserve.text.tokenizer import Tokenizer

__all__ = ["LegacyLogprobs", "chat_logprobs", "prompt_logprobs"]

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""

Json = dict[str, object]
Lists = dict[str, list[Any]]


def chat_logprobs(tokenizer: Tokenizer, delta: TextDelta) -> list[Json]:
    """One entry for each token: `token`, `logprob`, `bytes` and `top_logprobs`."""
    return [
        {
            **_entry(tokenizer, token_id, logprobs.logprob),
            "top_logprobs": [_entry(tokenizer, top_id, value) for top_id, value in logprobs.top],
        }
        for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True)
    ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> Json:
    raw = tokenizer.token_bytes(token_id)
    text = raw.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(raw)}


def prompt_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs],
    num_top: int,
) -> list[dict[str, Json] | None]:
    """For each prompt token a table by id: the token's own entry and those of `num_top` others.

    Nothing precedes the first token: its place holds None. `entries` begins with the second's. The
    rank is told where it is known: of the likeliest ids, from 1.
    """
    known = zip(token_ids[1:], entries, strict=True)
    return [None, *(_table(tokenizer, token_id, entry, num_top) for token_id, entry in known)]


def _table(
    tokenizer: Tokenizer, token_id: int, entry: TokenLogprobs, num_top: int
) -> dict[str, Json]:
    table: dict[str, Json] = {}
    for rank, (top_id, logprob) in enumerate(entry.top, start=1):
        if rank <= num_top or top_id == token_id:
            table[str(top_id)] = {
                "logprob": max(logprob, LOWEST),
                "rank": rank,
                "decoded_token": tokenizer.token_text(top_id),
            }
    own = {
        "logprob": max(entry.logprob, LOWEST),
        "decoded_token": tokenizer.token_text(token_id),
    }
    return {str(token_id): own, **table}


class LegacyLogprobs:
    """The completions' shape, in parallel lists; `text_offset` counts on over a whole choice."""

    def __init__(self, tokenizer: Tokenizer, *, num_top: int) -> None:
        """`num_top` likeliest tokens are told beside each."""
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def of_prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> Lists:
        """The lists for an echoed prompt; the first token has no log-probability."""
        return self._lists(token_ids, [None, *entries])

    def of_text(self, delta: TextDelta) -> Lists:
        """The lists for one piece of a choice; the pieces' lists join to the whole's."""
        return self._lists(delta.token_ids, delta.logprobs)

    def _lists(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> Lists:
        tokens, offsets = [], []
        for token_id in token_ids:
            text = self._tokenizer.token_text(token_id)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [entry and max(entry.logprob, LOWEST) for entry in entries],
            "top_logprobs": [entry and self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float] | None:
        """Alternatives by text; where two ids have the same text the likelier one stays."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top[: self._num_top]:
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, LOWEST))
        return top or None
