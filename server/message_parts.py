"""An answer's text taken apart: reasoning, what is said, and calls of tools.

Parts are given out as soon as they are certain; a piece of text that may still become a mark waits.
However a text is cut into pieces, its parts are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .tools_calls import CallParser, ToolCall, held_back

__all__ = ["THINK_CLOSE", "THINK_OPEN", "MessageParser", "MessagePiece", "ReasoningParser"]

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


@dataclass(slots=True)
class MessagePiece:
    """What one piece of text adds to a message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether it adds nothing."""
        return not (self.content or self.reasoning or self.tool_calls)


class ReasoningParser:
    """Reasoning at the beginning of a text, up to `</think>`; white space at its edges goes."""

    def __init__(self, *, is_open: bool) -> None:
        """`is_open`: the prompt ended with the opening mark."""
        self._buffer = ""
        self._is_inside = is_open
        self._is_over = False
        self._at_start = True

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and content that a piece adds."""
        if self._is_over:
            return "", self._trim(text)
        self._buffer += text
        if not self._is_inside and not self._enter():
            return "", self._leave() if self._is_over else ""
        return self._advance()

    def flush(self) -> tuple[str, str]:
        """The text is over: what was held back."""
        rest, self._buffer = self._buffer, ""
        return (self._trim(rest), "") if self._is_inside else ("", rest)

    def _enter(self) -> bool:
        begin = self._buffer.lstrip()
        if begin.startswith(THINK_OPEN):
            self._buffer = begin[len(THINK_OPEN) :]
            self._is_inside = True
        else:
            self._is_over = not THINK_OPEN.startswith(begin)
            self._at_start = not self._is_over
        return self._is_inside

    def _advance(self) -> tuple[str, str]:
        reasoning, mark, rest = self._buffer.partition(THINK_CLOSE)
        if mark:
            self._buffer, self._is_inside, self._is_over = "", False, True
            reasoning = self._trim(reasoning).rstrip()
            self._at_start = True
            return reasoning, self._trim(rest)
        keep = held_back(reasoning, THINK_CLOSE)
        shown = reasoning[: len(reasoning) - keep].rstrip()
        self._buffer = reasoning[len(shown) :]
        return self._trim(shown), ""

    def _leave(self) -> str:
        text, self._buffer = self._buffer, ""
        return text

    def _trim(self, text: str) -> str:
        """Without white space at a part's start."""
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return text


class MessageParser:
    """One choice's text in pieces, each taken apart."""

    def __init__(
        self, *, reasoning: ReasoningParser | None = None, calls: CallParser | None = None
    ) -> None:
        """None: that part is not looked for."""
        self._reasoning = reasoning
        self._calls = calls
        self.has_calls = False

    def push(self, text: str, *, is_last: bool) -> MessagePiece:
        """Go on by a piece; with the last one, whatever was held back."""
        piece = MessagePiece(content=text)
        if self._reasoning is not None:
            piece.reasoning, piece.content = self._reasoning.push(text)
            if is_last:
                reasoning, content = self._reasoning.flush()
                piece.reasoning += reasoning
                piece.content += content
        if self._calls is not None:
            piece.content, piece.tool_calls = self._calls.push(piece.content)
            if is_last:
                content, calls = self._calls.flush()
                piece.content += content
                piece.tool_calls += calls
        self.has_calls |= bool(piece.tool_calls)
        return piece
