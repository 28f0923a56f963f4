"""Types of request fields that hold lists or objects: one loop each, over at the first fault.

They are declared for pydantic with a validator of our own and with the JSON schema that the
OpenAPI document shows.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

__all__ = ["LogitBias", "Prompt", "Prompts", "StopStrings", "Texts", "TokenIds"]

Prompt = str | list[int]


def _parse_prompts(value: Any) -> list[Prompt]:
    """One text, several, one list of ids, or several such lists, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("takes a string, a list of strings, a list of ids or a list of such lists")
    kinds = set(map(type, value))
    if kinds == {str}:
        return value
    if kinds == {int}:
        return [value]
    if kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value):
        return value
    raise ValueError("is a list that mixes kinds, or holds something other than strings and ids")


def _parse_texts(value: Any) -> list[str]:
    """One text or several, as a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value or set(map(type, value)) != {str}:
        raise ValueError("takes a string or a list of strings")
    return value


def _parse_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("takes a list of whole numbers")
    return tuple(value)


def _parse_stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not set(map(type, value)) <= {str}:
        raise ValueError("takes a string or a list of strings")
    return tuple(value)


def _parse_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or not set(map(type, value.values())) <= {int, float}:
        raise ValueError("takes an object of token ids and numbers")
    biases = {int(name): number for name, number in value.items() if _is_id(name)}
    if len(biases) < len(value):
        raise ValueError("takes token ids as its names, written as plain decimal numbers")
    return biases


def _is_id(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 10 and str(int(name)) == name


_IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_STRINGS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _STRINGS_SCHEMA,
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA},
    ]
}
_BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number"}}
Prompts = Annotated[list[Prompt], PlainValidator(_parse_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
TokenIds = Annotated[tuple[int, ...], PlainValidator(_parse_ids), WithJsonSchema(_IDS_SCHEMA)]
StopStrings = Annotated[
    tuple[str, ...],
    PlainValidator(_parse_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS_SCHEMA]}),
]
Texts = Annotated[
    list[str],
    PlainValidator(_parse_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS_SCHEMA]}),
]
LogitBias = Annotated[
    dict[int, float], PlainValidator(_parse_logit_bias), WithJsonSchema(_BIAS_SCHEMA)
]
