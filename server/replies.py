"""Replies of the OpenAI routes as bytes: whole ones and the events of a stream.

A stream's events differ in one choice each; the rest is encoded once for the request, so that a
token costs one small `orjson.dumps` and a concatenation.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from llmserve.engine.request import FinishReason
from llmserve.output import TextDelta
from llmserve.text.tokenizer import Tokenizer

from .generation import Update, Usage
from .logprobs import LegacyLogprobs, chat_logprobs

__all__ = [
    "ChatFormat",
    "CompletionFormat",
    "ReplyFormat",
    "ReplyHead",
    "done_event",
    "event",
]

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What is the same in every part of one reply."""

    request_id: str
    """Hexadecimal; the API's prefix is put before it."""
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""


def event(payload: bytes) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one line is one event."""
    return b"data: " + payload + b"\n\n"


done_event = event(b"[DONE]")
"""The last event of every stream."""


class ReplyFormat(ABC):
    """One request's reply in one route's shape; keeps what its choices need between events."""

    kind: str
    stream_kind: str
    id_prefix: str

    def __init__(self, head: ReplyHead, *, continuous_usage: bool = False) -> None:
        """With `continuous_usage` every event of a stream tells the tokens so far."""
        self.continuous_usage = continuous_usage
        self._fields: Json = {
            "id": f"{self.id_prefix}-{head.request_id}",
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
        }
        opening = orjson.dumps({"object": self.stream_kind, **self._fields})[:-1]
        self._event_head = b"data: " + opening + b',"choices":['

    def whole(self, choices: Sequence[Sequence[TextDelta]], usage: Usage) -> bytes:
        """The reply to a request that was not streamed; `choices` holds each one's pieces."""
        bodies = [self._whole_choice(index, deltas) for index, deltas in enumerate(choices)]
        return orjson.dumps(
            {"object": self.kind, **self._fields, "choices": bodies, "usage": usage.as_dict()}
        )

    def chunk(self, update: Update, usage: Usage | None) -> bytes:
        """The event for one piece of one choice."""
        tail = b"]}\n\n"
        if usage is not None:
            tail = b'],"usage":' + orjson.dumps(usage.as_dict()) + b"}\n\n"
        return self._event_head + orjson.dumps(self._chunk_choice(update)) + tail

    def usage_event(self, usage: Usage) -> bytes:
        """The event with the totals, sent last and only where it was asked for."""
        return self._event_head + b'],"usage":' + orjson.dumps(usage.as_dict()) + b"}\n\n"

    @abstractmethod
    def _whole_choice(self, index: int, deltas: Sequence[TextDelta]) -> Json:
        """One choice of a whole reply."""

    @abstractmethod
    def _chunk_choice(self, update: Update) -> Json:
        """One choice of a streamed chunk."""


class CompletionFormat(ReplyFormat):
    """`/v1/completions`."""

    kind = stream_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        *,
        echoes: Sequence[str],
        with_logprobs: bool,
        continuous_usage: bool = False,
    ) -> None:
        """`echoes` is the text to put before each choice, one for each."""
        super().__init__(head, continuous_usage=continuous_usage)
        self._echoes = list(echoes)
        self._logprobs = [LegacyLogprobs(tokenizer) for _ in echoes] if with_logprobs else None

    def _whole_choice(self, index: int, deltas: Sequence[TextDelta]) -> Json:
        return self._choice(index, _join(deltas))

    def _chunk_choice(self, update: Update) -> Json:
        return self._choice(update.index, update.delta)

    def _choice(self, index: int, delta: TextDelta) -> Json:
        echo, self._echoes[index] = self._echoes[index], ""
        return {
            "index": index,
            "text": echo + delta.text,
            "logprobs": self._logprobs[index].render(delta) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


class ChatFormat(ReplyFormat):
    """`/v1/chat/completions`."""

    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        *,
        num_choices: int,
        with_logprobs: bool,
        continuous_usage: bool = False,
    ) -> None:
        super().__init__(head, continuous_usage=continuous_usage)
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._has_role = [False] * num_choices

    def _whole_choice(self, index: int, deltas: Sequence[TextDelta]) -> Json:
        delta = _join(deltas)
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": index, "message": message, **self._end_of_choice(delta)}

    def _chunk_choice(self, update: Update) -> Json:
        content: Json = {"content": update.delta.text}
        if not self._has_role[update.index]:  # together with the first token, not before it
            self._has_role[update.index] = True
            content = {"role": "assistant", **content}
        return {"index": update.index, "delta": content, **self._end_of_choice(update.delta)}

    def _end_of_choice(self, delta: TextDelta) -> Json:
        logprobs: Json | None = None
        if self._with_logprobs:
            logprobs = {"content": chat_logprobs(self._tokenizer, delta)}
        return {
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


def _join(deltas: Sequence[TextDelta]) -> TextDelta:
    """One piece in place of several."""
    finish_reason: FinishReason | None = deltas[-1].finish_reason
    return TextDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        finish_reason=finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
