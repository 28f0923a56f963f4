"""The shape of `/v1/responses` replies: one message of text, in a stream by named events."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from llmserve.engine.request import FinishReason

from .generation import Update, Usage
from .message_parts import MessageParser
from .replies import Json, ReplyFormat, ReplyHead

__all__ = ["ResponsesFormat", "named_event"]


def named_event(name: str, fields: Json) -> bytes:
    """A server-sent event with its name."""
    payload = orjson.dumps({"type": name, **fields})
    return b"event: " + name.encode() + b"\ndata: " + payload + b"\n\n"


class ResponsesFormat(ReplyFormat):
    """`/v1/responses`."""

    def __init__(self, head: ReplyHead, parser: MessageParser, asked: Json) -> None:
        """`parser` takes the text apart; `asked` is what the reply repeats of the request."""
        self._parser = parser
        self._head = {
            "id": f"resp_{head.request_id}",
            "object": "response",
            "created_at": head.created,
            "model": head.model,
            "error": None,
            **asked,
        }
        self._item_id = f"msg_{head.request_id}"
        self._text = ""
        self._num_events = 0
        self._finish_reason: FinishReason | None = None

    def whole(self, choices: Sequence[Sequence[Update]], usage: Usage) -> bytes:
        """The reply to a request that was not streamed."""
        for update in choices[0]:
            self._take(update)
        return orjson.dumps(self._response(usage))

    def chunk(self, update: Update, usage: Usage | None) -> bytes:
        """The events for one piece of text, after those that open the message."""
        opening = b"" if self._num_events else self._opening()
        piece = self._take(update)
        if not piece:
            return opening
        return opening + self._event("response.output_text.delta", self._at(delta=piece))

    def closing(self, usage: Usage, *, include_usage: bool) -> bytes:
        """The events that close the message and the response; totals always come with them."""
        part = _part(self._text)
        response = self._response(usage)
        return (
            self._event("response.output_text.done", self._at(text=self._text))
            + self._event("response.content_part.done", self._at(part=part))
            + self._event("response.output_item.done", {"output_index": 0, "item": self._item()})
            + self._event(f"response.{response['status']}", {"response": response})
        )

    def failure(self, body: bytes) -> bytes:
        """The one event of a stream that went wrong."""
        error = orjson.loads(body)["error"]
        return self._event("error", {name: error[name] for name in ("message", "param", "code")})

    def _take(self, update: Update) -> str:
        reason = update.delta.finish_reason
        piece = self._parser.push(update.delta.text, is_last=reason is not None).content
        self._text += piece
        self._finish_reason = reason or self._finish_reason
        return piece

    def _opening(self) -> bytes:
        response = {**self._head, "status": "in_progress", "output": [], "usage": None}
        item = {**self._item(), "status": "in_progress", "content": []}
        return (
            self._event("response.created", {"response": response})
            + self._event("response.in_progress", {"response": response})
            + self._event("response.output_item.added", {"output_index": 0, "item": item})
            + self._event("response.content_part.added", self._at(part=_part("")))
        )

    def _event(self, name: str, fields: Json) -> bytes:
        self._num_events += 1
        return named_event(name, {"sequence_number": self._num_events - 1, **fields})

    def _at(self, **fields: object) -> Json:
        """Fields of an event about the message's text."""
        extra: Json = {} if "part" in fields else {"logprobs": []}
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return {**place, **extra, **fields}

    def _item(self) -> Json:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": self._status(),
            "content": [_part(self._text)],
        }

    def _status(self) -> str:
        return "completed" if self._finish_reason is FinishReason.STOP else "incomplete"

    def _response(self, usage: Usage) -> Json:
        status = self._status()
        details = None if status == "completed" else {"reason": "max_output_tokens"}
        return {
            **self._head,
            "status": status,
            "incomplete_details": details,
            "output": [self._item()],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
