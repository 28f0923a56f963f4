"""A stream that lost its server goes on with a replay of the whole request by another.

A request's tokens depend on its model, its seed and nothing else, so another server of the same
model says the same again. The replay's events lose what the client has already, and what is left
goes on where the first stream broke off. That both say the same is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from llmserve.errors import EngineError

__all__ = ["MODEL_ROUTES", "DivergedError", "Resumption", "can_resume", "with_seed"]

MODEL_ROUTES = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Routes whose streams can be resumed: lists of choices, each of them a growing text."""

# Lists beside the text, and calls that are told whole: they are not put together again.
_NOT_RESUMED = ("logprobs", "prompt_logprobs", "top_logprobs", "tools", "timing")
_PREFIX = b"data: "
_DONE = b"[DONE]"


class DivergedError(EngineError):
    """The replay does not say what the lost stream said."""


def can_resume(path: str, fields: dict[str, Any]) -> bool:
    """Whether a request's stream could be taken up by another server, given a seed."""
    return (
        path in MODEL_ROUTES
        and fields.get("stream") is True
        and all(fields.get(name) in (None, False) for name in _NOT_RESUMED)
    )


def with_seed(body: bytes, fields: dict[str, Any], seed: int) -> bytes:
    """The request with `seed` if it has none: a replay must draw the same tokens."""
    if fields.get("seed") is not None:
        return body
    return orjson.dumps({**fields, "seed": seed})


class Resumption:
    """What is left of a stream, out of a replay of the whole."""

    def __init__(self, sent: bytes) -> None:
        """`sent`: every whole event that the client has."""
        self._texts: dict[tuple[int, str], str] = {}
        self._ended: set[int] = set()
        self._has_usage = False
        self._is_done = False
        self._head: dict[str, Any] = {}
        self._at: dict[tuple[int, str], int] = {}
        for data in _events(sent):
            if data == _DONE:
                self._is_done = True
            else:
                self._note(orjson.loads(data))

    def rest(self, chunk: bytes) -> bytes:
        """What the client does not have of some whole events of the replay.

        Raises:
            DivergedError: they say something else than it was sent.
        """
        return b"".join(map(self._rest_of, _events(chunk)))

    def _note(self, event: dict[str, Any]) -> None:
        if not self._head:
            names = ("id", "created", "system_fingerprint")
            self._head = {name: event[name] for name in names if name in event}
        self._has_usage |= event.get("choices") == []
        for choice in event.get("choices", ()):
            for name, _, text in _texts(choice):
                key = choice["index"], name
                self._texts[key] = self._texts.get(key, "") + text
            if choice["finish_reason"] is not None:
                self._ended.add(choice["index"])

    def _rest_of(self, data: bytes) -> bytes:
        if data == _DONE:
            return b"" if self._is_done else _PREFIX + data + b"\n\n"
        event = orjson.loads(data)
        if "choices" not in event:  # an error
            return _PREFIX + data + b"\n\n"
        if event.get("system_fingerprint") != self._head.get("system_fingerprint"):
            raise DivergedError("the stream's model is served no more, and it cannot go on")
        is_new = [self._cut(choice) for choice in event["choices"]]
        if not any(is_new) and (event["choices"] or self._has_usage):
            return b""
        return _PREFIX + orjson.dumps({**event, **self._head}) + b"\n\n"

    def _cut(self, choice: dict[str, Any]) -> bool:
        """Take out of `choice` what was sent; whether anything is left."""
        index, has_text = choice["index"], False
        for name, holder, text in _texts(choice):
            key = index, name
            at = self._at.get(key, 0)
            sent = self._texts.get(key, "")[at : at + len(text)]
            if not text.startswith(sent):
                raise DivergedError("the replay of the lost stream says something else")
            self._at[key] = at + len(text)
            holder[name] = text[len(sent) :]
            has_text |= bool(holder[name])
        if any(known == index for known, _ in self._texts):
            choice.get("delta", {}).pop("role", None)
        if choice["finish_reason"] is None:
            return has_text
        if any(
            self._at.get(key, 0) < len(text) for key, text in self._texts.items() if key[0] == index
        ):
            raise DivergedError("the replay of the lost stream ends earlier")
        return index not in self._ended


def _events(chunk: bytes) -> Iterator[bytes]:
    """The data of each event; all of them are whole."""
    return (block.removeprefix(_PREFIX) for block in chunk.split(b"\n\n") if block)


def _texts(choice: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The growing texts of a choice: name, where it stands, text."""
    for holder, names in ((choice, ("text",)), (choice.get("delta", {}), ("content", "reasoning"))):
        for name in names:
            if isinstance(holder.get(name), str):
                yield name, holder, holder[name]
