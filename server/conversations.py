"""Conversations as clients send them: messages of text, whole or in parts, and calls of tools."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, ValidationError, WithJsonSchema

from .validation import Strict, first_fault

__all__ = ["CalledFunction", "Message", "Messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")


class CalledFunction(Strict):
    """A call that the assistant made in an earlier turn."""

    call_id: str
    name: str
    arguments: dict[str, Any]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[CalledFunction, ...] = ()
    tool_call_id: str | None = None


def _parse_messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError("takes a list of at least one message")
    return [_parse_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _parse_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"must hold objects; {where} is none")
    given = {name: field for name, field in item.items() if field is not None}
    if unknown := given.keys() - Message.model_fields.keys():
        raise ValueError(f"{where}.{min(unknown)[:64]} is not supported by this server")
    if isinstance(given.get("content"), list):
        given["content"] = _join_parts(given["content"], where)
    if "tool_calls" in given:
        given["tool_calls"] = _parse_calls(given["tool_calls"], where)
    try:
        message = Message.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{where}.{first_fault(error)[1]}") from error
    _check_role(message, where)
    return message


def _check_role(message: Message, where: str) -> None:
    """What only some roles have, and what every other needs."""
    is_assistant = message.role == "assistant"
    if not is_assistant and (message.tool_calls or message.reasoning):
        raise ValueError(f"{where}: tool_calls and reasoning belong to the role assistant")
    if message.tool_call_id is not None and message.role != "tool":
        raise ValueError(f"{where}.tool_call_id belongs to the role tool")
    if message.content is None and not message.tool_calls:
        raise ValueError(f"{where}.content is required")


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of a content that comes as a list of parts."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"{where}.content may hold parts of type 'text' only")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"{where}.content holds a part that is not {{type, text}}")
    return "".join(part["text"] for part in parts)


def _parse_calls(calls: Any, where: str) -> tuple[CalledFunction, ...]:
    if not isinstance(calls, list):
        raise ValueError(f"{where}.tool_calls takes a list")
    return tuple(
        _parse_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
    )


def _parse_call(call: Any, where: str) -> CalledFunction:
    match call:
        case {
            "id": str() as call_id,
            "type": "function",
            "function": {"name": str() as name, "arguments": str() as text},
        }:
            try:
                arguments = json.loads(text)
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                return CalledFunction(call_id=call_id, name=name, arguments=arguments)
            raise ValueError(f"{where}.function.arguments is no JSON object")
    raise ValueError(f"{where} is not {{id, type, function: {{name, arguments}}}}")


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "type", "function"],
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]},
            "name": {"type": "string"},
            "reasoning": {"type": "string"},
            "tool_calls": {"type": "array", "items": _CALL_SCHEMA},
            "tool_call_id": {"type": "string"},
        },
        "required": ["role"],
        "additionalProperties": False,
    },
}
Messages = Annotated[
    list[Message], PlainValidator(_parse_messages), WithJsonSchema(_MESSAGES_SCHEMA)
]
