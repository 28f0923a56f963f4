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

from llmserve.output import TextDelta

from .generation import Update, Usage

__all__ = ["ChoicesFormat", "Json", "ReplyFormat", "ReplyHead", "done_event", "event"]

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

    continuous_usage = False
    """Whether every event of a stream tells the tokens so far."""

    @abstractmethod
    def whole(self, choices: Sequence[Sequence[Update]], usage: Usage) -> bytes:
        """The reply to a request that was not streamed; `choices` holds each one's pieces."""

    @abstractmethod
    def chunk(self, update: Update, usage: Usage | None) -> bytes:
        """The events for one piece of one choice; nothing while all of it is held back."""

    @abstractmethod
    def closing(self, usage: Usage, *, include_usage: bool) -> bytes:
        """The last events of a stream that went well; with the totals where they are asked for."""

    @abstractmethod
    def failure(self, body: bytes) -> bytes:
        """The last events of a stream that went wrong; `body` is the error's reply."""


class ChoicesFormat(ReplyFormat):
    """The shape of completions and chat: a list of choices."""

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

    def whole(self, choices: Sequence[Sequence[Update]], usage: Usage) -> bytes:
        """The reply to a request that was not streamed."""
        bodies = [self._whole_choice(_join(updates)) for updates in choices]
        return orjson.dumps(
            {"object": self.kind, **self._fields, "choices": bodies, "usage": usage.as_dict()}
        )

    def chunk(self, update: Update, usage: Usage | None) -> bytes:
        """The event for one piece of one choice."""
        choice = self._chunk_choice(update)
        if choice is None:
            return b""
        tail = b"]}\n\n"
        if usage is not None:
            tail = b'],"usage":' + orjson.dumps(usage.as_dict()) + b"}\n\n"
        return self._event_head + orjson.dumps(choice) + tail

    def closing(self, usage: Usage, *, include_usage: bool) -> bytes:
        """The totals, where they are asked for, and the end."""
        return (self.usage_event(usage) if include_usage else b"") + done_event

    def failure(self, body: bytes) -> bytes:
        """The error, and the end."""
        return event(body) + done_event

    def usage_event(self, usage: Usage) -> bytes:
        """The event with the totals, sent last and only where it was asked for."""
        return self._event_head + b'],"usage":' + orjson.dumps(usage.as_dict()) + b"}\n\n"

    @abstractmethod
    def _whole_choice(self, update: Update) -> Json:
        """One choice of a whole reply."""

    @abstractmethod
    def _chunk_choice(self, update: Update) -> Json | None:
        """One choice of a streamed chunk; None: there is nothing to tell yet."""


def _join(updates: Sequence[Update]) -> Update:
    """One piece in place of several."""
    deltas = [update.delta for update in updates]
    delta = TextDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
    return Update(updates[0].index, delta, updates[0].prompt_logprobs)
