"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from llmserve.output import TextDelta
from llmserve.runners.protocol import TokenLogprobs
from llmserve.text.tokenizer import Tokenizer

__all__ = ["LegacyLogprobs", "chat_logprobs"]

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""

Json = dict[str, object]


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


class LegacyLogprobs:
    """The completions' shape, in parallel lists; `text_offset` counts on over a whole choice."""

    def __init__(self, tokenizer: Tokenizer, *, offset: int = 0) -> None:
        """`offset` is the length of the text before the first token."""
        self._tokenizer = tokenizer
        self._offset = offset

    def render(self, delta: TextDelta) -> Json:
        """The lists for one piece of a choice; the pieces' lists join to the whole's."""
        tokens, offsets = [], []
        for token_id in delta.token_ids:
            text = self._tokenizer.token_text(token_id)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, LOWEST) for entry in delta.logprobs],
            "top_logprobs": [self._top(entry) for entry in delta.logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float] | None:
        """Alternatives by text; where two ids have the same text the likelier one stays."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top:
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, LOWEST))
        return top or None
