"""The shape of `/v1/messages` replies: one block of text, in a stream by named events."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from llmserve.engine.request import FinishReason
from llmserve.output import TextDelta

from .generation import Update, Usage
from .message_parts import MessageParser
from .replies import Json, ReplyFormat, ReplyHead
from .responses_reply import named_event

__all__ = ["MessagesFormat"]

STOP_REASONS = {FinishReason.STOP: "end_turn", FinishReason.LENGTH: "max_tokens"}


class MessagesFormat(ReplyFormat):
    """`/v1/messages`."""

    def __init__(self, head: ReplyHead, parser: MessageParser, *, num_prompt_tokens: int) -> None:
        """`parser` takes the text apart; what is not said aloud is left out."""
        self._parser = parser
        self._num_prompt_tokens = num_prompt_tokens
        self._head: Json = {
            "id": f"msg_{head.request_id}",
            "type": "message",
            "role": "assistant",
            "model": head.model,
        }
        self._has_begun = False
        self._end: Json = {"stop_reason": None, "stop_sequence": None}

    def whole(self, choices: Sequence[Sequence[Update]], usage: Usage) -> bytes:
        """The reply to a request that was not streamed."""
        text = "".join(self._take(update.delta) for update in choices[0])
        content = [{"type": "text", "text": text}]
        told = {**self._head, "content": content, **self._end, "usage": _usage(usage)}
        return orjson.dumps(told)

    def chunk(self, update: Update, usage: Usage | None) -> bytes:
        """The event for one piece of text, after those that open the message."""
        opening = b"" if self._has_begun else self._opening()
        self._has_begun = True
        text = self._take(update.delta)
        if not text:
            return opening
        delta = {"type": "text_delta", "text": text}
        return opening + named_event("content_block_delta", {"index": 0, "delta": delta})

    def closing(self, usage: Usage, *, include_usage: bool) -> bytes:
        """The events that close the block and the message; totals always come with them."""
        totals: Json = {"delta": self._end, "usage": _usage(usage)}
        return (
            named_event("content_block_stop", {"index": 0})
            + named_event("message_delta", totals)
            + named_event("message_stop", {})
        )

    def failure(self, body: bytes) -> bytes:
        """The one event of a stream that went wrong."""
        error = orjson.loads(body)["error"]
        told = {"type": error["type"], "message": error["message"]}
        return named_event("error", {"error": told})

    def _opening(self) -> bytes:
        usage = {"input_tokens": self._num_prompt_tokens, "output_tokens": 0}
        message = {**self._head, "content": [], **self._end, "usage": usage}
        block = {"type": "text", "text": ""}
        return named_event("message_start", {"message": message}) + named_event(
            "content_block_start", {"index": 0, "content_block": block}
        )

    def _take(self, delta: TextDelta) -> str:
        reason = delta.finish_reason
        if reason is not None:
            is_string = isinstance(delta.stop_reason, str)
            self._end = {
                "stop_reason": "stop_sequence" if is_string else STOP_REASONS.get(reason, reason),
                "stop_sequence": delta.stop_reason if is_string else None,
            }
        return self._parser.push(delta.text, is_last=reason is not None).content


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
