"""Conversations as clients send them: messages of plain text, whole or in parts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PlainValidator, ValidationError, WithJsonSchema

from .validation import Strict, first_fault

__all__ = ["Message", "Messages"]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


def _parse_messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError("takes a list of at least one message")
    return [_parse_message(item, index) for index, item in enumerate(value)]


def _parse_message(item: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, dict):
        raise ValueError(f"must hold objects; {where} is none")
    for name in item:
        if name not in Message.model_fields and item[name] is not None:
            raise ValueError(f"{where}.{name[:64]} is not supported by this server")
    known = {name: item[name] for name in item if name in Message.model_fields}
    if isinstance(known.get("content"), list):
        known["content"] = _join_parts(known["content"], where)
    try:
        return Message.model_validate(known)
    except ValidationError as error:
        raise ValueError(f"{where}.{first_fault(error)[1]}") from error


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of a content that comes as a list of parts."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"{where}.content may hold parts of type 'text' only")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"{where}.content holds a part that is not {{type, text}}")
    return "".join(part["text"] for part in parts)


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]},
            "name": {"type": "string"},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
}
Messages = Annotated[
    list[Message], PlainValidator(_parse_messages), WithJsonSchema(_MESSAGES_SCHEMA)
]
