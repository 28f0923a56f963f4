"""The request fields `tools` and `tool_choice`, checked as far as their shape goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

__all__ = ["NamedTool", "Tool", "ToolChoice", "Tools"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FUNCTION_FIELDS = {"name": str, "description": str, "parameters": dict, "strict": bool}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask for."""

    name: str
    parameters: dict[str, Any]
    """JSON schema of its arguments."""
    definition: dict[str, Any]
    """As it was sent, for chat templates."""


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The one function that must be called."""

    name: str


def _parse_tools(value: Any) -> tuple[Tool, ...]:
    if not isinstance(value, list):
        raise ValueError("takes a list of functions")
    tools = tuple(_parse_tool(item, f"tools[{index}]") for index, item in enumerate(value))
    if len({tool.name for tool in tools}) < len(tools):
        raise ValueError("name a function twice")
    return tools


def _parse_tool(item: Any, where: str) -> Tool:
    if not isinstance(item, dict) or item.get("type") != "function":
        raise ValueError(f"hold objects of the type 'function' only; {where} is none")
    function = item.get("function")
    if item.keys() != {"type", "function"} or not isinstance(function, dict):
        raise ValueError(f"{where} takes the fields type and function")
    given = {name: field for name, field in function.items() if field is not None}
    for name, field in given.items():
        kind = _FUNCTION_FIELDS.get(name)
        if kind is None or not isinstance(field, kind):
            raise ValueError(f"{where}.function.{name[:64]} is not known or of the wrong type")
    if not _NAME.fullmatch(given.get("name", "")):
        raise ValueError(f"{where}.function.name takes 1 to 64 letters, digits, '_', '.' and '-'")
    parameters = given.get("parameters", {"type": "object"})
    return Tool(given["name"], parameters, {"type": "function", "function": given})


def _parse_tool_choice(value: Any) -> str | NamedTool:
    if value in ("none", "auto", "required") and isinstance(value, str):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function")
        if value.keys() == {"type", "function"} and isinstance(function, dict):
            name = function.get("name")
            if function.keys() == {"name"} and isinstance(name, str):
                return NamedTool(name)
    raise ValueError("takes none, auto, required, or an object that names a function")


_TOOLS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "description": {"type": "string"},
                    "parameters": {"type": "object"},
                    "strict": {"type": "boolean"},
                },
                "required": ["name"],
                "additionalProperties": False,
            },
        },
        "required": ["type", "function"],
        "additionalProperties": False,
    },
}
_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}
Tools = Annotated[tuple[Tool, ...], PlainValidator(_parse_tools), WithJsonSchema(_TOOLS_SCHEMA)]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    PlainValidator(_parse_tool_choice),
    WithJsonSchema(_TOOL_CHOICE_SCHEMA),
]
