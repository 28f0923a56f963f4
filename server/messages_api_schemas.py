"""The request of Anthropic's Messages route in its text form, as the chat request it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema

from .chat_schemas import ChatRequest
from .field_values import StopStrings
from .schemas import ModelRequest, parse_request

__all__ = ["MessagesRequest"]


def _parse_text(value: Any) -> str:
    """A text, or a list of blocks of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("takes a text or a list of blocks of text")
    for block in value:
        if not isinstance(block, dict) or block.get("type") != "text":
            raise ValueError("may hold blocks of the type 'text' only")
        if block.keys() - {"type", "text", "cache_control", "citations"}:
            raise ValueError("holds a block that is not {type, text}")
        if not isinstance(block.get("text"), str):
            raise ValueError("holds a block without a text")
    return "".join(block["text"] for block in value)


def _parse_turns(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError("takes a list of at least one message")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise ValueError(f"[{index}] is not {{role, content}}")
        if turn["role"] not in ("user", "assistant"):
            raise ValueError(f"[{index}].role takes user and assistant")
        turns.append({"role": turn["role"], "content": _parse_text(turn["content"])})
    return turns


_TEXT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
Text = Annotated[str, PlainValidator(_parse_text), WithJsonSchema(_TEXT_SCHEMA)]
Turns = Annotated[
    list[dict[str, Any]],
    PlainValidator(_parse_turns),
    WithJsonSchema({"type": "array", "items": {"type": "object"}, "minItems": 1}),
]


class MessagesRequest(ModelRequest):
    """`POST /v1/messages`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
        "thinking": ({"type": "disabled"},),
        "container": (),
        "mcp_servers": ([],),
        "context_management": (),
    }

    max_tokens: Annotated[int, Field(ge=1)]
    messages: Turns
    system: Text | None = None
    stop_sequences: StopStrings = ()
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stream: bool = False

    def as_chat(self) -> ChatRequest:
        """The same as a chat request; a last message of the assistant's is gone on with.

        Raises `RequestError` naming a field at fault.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {
            "messages": [*system, *self.messages],
            "continue_final_message": self.messages[-1]["role"] == "assistant",
            "max_completion_tokens": self.max_tokens,
            "stop": list(self.stop_sequences),
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "stream": self.stream,
        }
        return parse_request(ChatRequest, body)[0]
