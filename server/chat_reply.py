"""The shape of `/v1/chat/completions` replies."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.engine.request import FinishReason
from llmserve.output import TextDelta
from llmserve.text.tokenizer import Tokenizer

from .generation import Update
from .logprobs import chat_logprobs
from .message_parts import MessageParser, MessagePiece
from .replies import ChoicesFormat, ReplyHead
from .tools_calls import ToolCall

__all__ = ["TOOL_CALLS", "ChatFormat"]

Json = dict[str, object]

TOOL_CALLS = "tool_calls"
"""Finish reason of a choice that calls tools."""


class ChatFormat(ChoicesFormat):
    """`/v1/chat/completions`."""

    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        *,
        parsers: Sequence[MessageParser],
        with_logprobs: bool,
        most_calls: int | None = None,
        shows_reasoning: bool = True,
        continuous_usage: bool = False,
    ) -> None:
        """How each choice is told.

        Args:
            head: What every part has in common.
            tokenizer: For the tokens' texts.
            parsers: One for each choice; takes its text apart.
            with_logprobs: Whether the tokens' log-probabilities are told.
            most_calls: Calls of tools to tell of each choice; None: all.
            shows_reasoning: Whether reasoning is told; else it is left out.
            continuous_usage: Whether every event of a stream tells the tokens so far.
        """
        super().__init__(head, continuous_usage=continuous_usage)
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._most_calls = most_calls
        self._shows_reasoning = shows_reasoning
        self._choices = [_Choice(parser) for parser in parsers]

    def _whole_choice(self, update: Update) -> Json:
        choice, delta = self._choices[update.index], update.delta
        piece = self._parse(choice, delta, is_last=True)
        has_text = bool(piece.content) or not piece.tool_calls
        message: Json = {
            "role": "assistant",
            "content": piece.content if has_text else None,
            "refusal": None,
        }
        if piece.reasoning:
            message["reasoning"] = piece.reasoning
        if piece.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in piece.tool_calls]
        end = self._end_of_choice(choice, delta)
        return {"index": update.index, "message": message, **end}

    def _chunk_choice(self, update: Update) -> Json | None:
        choice, delta = self._choices[update.index], update.delta
        is_last = delta.finish_reason is not None
        num_calls = choice.num_calls
        piece = self._parse(choice, delta, is_last=is_last)
        delta = choice.with_waiting(delta)
        if delta.text and piece.is_empty and not is_last:
            choice.waiting = delta
            return None  # all of it is held back
        told = _told(piece, num_calls)
        if not choice.has_role:  # together with the first token, not before it
            choice.has_role = True
            told = {"role": "assistant", **told}
        return {"index": update.index, "delta": told, **self._end_of_choice(choice, delta)}

    def _parse(self, choice: _Choice, delta: TextDelta, *, is_last: bool) -> MessagePiece:
        piece = choice.parser.push(delta.text, is_last=is_last)
        if not self._shows_reasoning:
            piece.reasoning = ""
        if self._most_calls is not None:
            del piece.tool_calls[max(0, self._most_calls - choice.num_calls) :]
        choice.num_calls += len(piece.tool_calls)
        return piece

    def _end_of_choice(self, choice: _Choice, delta: TextDelta) -> Json:
        logprobs: Json | None = None
        if self._with_logprobs:
            logprobs = {"content": chat_logprobs(self._tokenizer, delta)}
        reason: str | None = delta.finish_reason
        if reason is FinishReason.STOP and choice.num_calls:
            reason = TOOL_CALLS
        return {"logprobs": logprobs, "finish_reason": reason, "stop_reason": delta.stop_reason}


class _Choice:
    """What is kept of a choice between two events."""

    __slots__ = ("has_role", "num_calls", "parser", "waiting")

    def __init__(self, parser: MessageParser) -> None:
        self.parser = parser
        self.has_role = False
        self.num_calls = 0
        self.waiting: TextDelta | None = None
        """Tokens whose text is held back."""

    def with_waiting(self, delta: TextDelta) -> TextDelta:
        """`delta` after the tokens that waited for it."""
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return delta
        return TextDelta(
            text=waiting.text + delta.text,
            token_ids=waiting.token_ids + delta.token_ids,
            logprobs=waiting.logprobs + delta.logprobs,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )


def _told(piece: MessagePiece, num_calls: int) -> Json:
    """A stream's delta; `num_calls` calls came before."""
    told: Json = {}
    if piece.reasoning:
        told["reasoning"] = piece.reasoning
    if piece.tool_calls:
        told["tool_calls"] = [
            _indexed(call, num_calls + place) for place, call in enumerate(piece.tool_calls)
        ]
    if piece.content or not told:
        told["content"] = piece.content
    return told


def _indexed(call: ToolCall, index: int) -> Json:
    return {"index": index, **call.as_dict()}
