"""Calls of tools in a model's text, found while it comes.

Two forms are known. Hermes and Qwen models write a call between marks, possibly after a text; Llama
and Mistral models write JSON and nothing else. What looks like a call and is none stays text.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CALL_CLOSE",
    "CALL_OPEN",
    "CallParser",
    "JsonCallParser",
    "MarkedCallParser",
    "ToolCall",
    "held_back",
]

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model asks for."""

    name: str
    arguments: str
    """A JSON object, as text."""
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_dict(self) -> dict[str, object]:
        """In the API's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


Found = tuple[str, list[ToolCall]]
"""Text that is no call, and the calls."""


def held_back(text: str, mark: str) -> int:
    """Characters at the end of `text` that may become `mark`, which is not in it."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)


class CallParser(ABC):
    """Takes a text piece by piece, and gives its parts as soon as they are known."""

    @abstractmethod
    def push(self, text: str) -> Found:
        """Go on by a piece."""

    @abstractmethod
    def flush(self) -> Found:
        """The text is over: what was held back."""


class MarkedCallParser(CallParser):
    """Calls between `<tool_call>` and `</tool_call>`; white space alone beside them is no text."""

    def __init__(self) -> None:
        self._buffer = ""
        self._is_inside = False
        self._at_edge = True
        self._has_calls = False

    def push(self, text: str) -> Found:
        """Go on by a piece."""
        self._buffer += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        while (mark := CALL_CLOSE if self._is_inside else CALL_OPEN) in self._buffer:
            part, _, self._buffer = self._buffer.partition(mark)
            if self._is_inside:
                calls += (found := read_calls(part))
                self._has_calls |= bool(found)
                shown += [] if found else [f"{CALL_OPEN}{part}{CALL_CLOSE}"]
            elif part.strip() or not self._at_edge:
                shown.append(part)
            self._at_edge = self._is_inside
            self._is_inside = not self._is_inside
        if not self._is_inside:
            shown.append(self._take_certain())
        return "".join(shown), calls

    def flush(self) -> Found:
        """A call that was not closed counts where it can be read."""
        rest, self._buffer = self._buffer, ""
        if not self._is_inside:
            return (rest if rest.strip() or not self._has_calls else ""), []
        calls = read_calls(rest)
        return ("" if calls else CALL_OPEN + rest), calls

    def _take_certain(self) -> str:
        """What is text whatever comes: no mark's beginning, nor white space beside a call."""
        size = len(self._buffer) - held_back(self._buffer, CALL_OPEN)
        text = self._buffer[:size]
        if self._at_edge and not text.strip():
            return ""
        self._at_edge = False
        self._buffer = self._buffer[size:]
        return text


class JsonCallParser(CallParser):
    """A text that is one call, or a list of calls, from beginning to end."""

    def __init__(self) -> None:
        self._buffer = ""
        self._is_text = False

    def push(self, text: str) -> Found:
        """Go on by a piece."""
        if self._is_text:
            return text, []
        self._buffer += text
        begin = self._buffer.lstrip()[:1]
        if begin in ("", "{", "["):
            return "", []
        self._is_text = True
        return self._take(), []

    def flush(self) -> Found:
        """The calls, or the text that it was after all."""
        calls = read_calls(self._buffer)
        rest = self._take()
        return "" if calls else rest, calls

    def _take(self) -> str:
        text, self._buffer = self._buffer, ""
        return text


def read_calls(text: str) -> list[ToolCall]:
    """The calls that a JSON text stands for; none where it stands for something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    items = value if isinstance(value, list) else [value]
    calls = [_call_of(item) for item in items]
    return [call for call in calls if call is not None] if None not in calls else []


def _call_of(item: Any) -> ToolCall | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the object as text
        return ToolCall(item["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(item["name"], json.dumps(arguments, ensure_ascii=False))
