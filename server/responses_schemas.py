"""The request of OpenAI's Responses route in its text form, as the chat request it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import PlainValidator, WithJsonSchema

from .chat_schemas import ChatRequest
from .schemas import ModelRequest, parse_request

__all__ = ["ResponsesRequest"]

PART_TYPES = ("input_text", "output_text", "text")


def _parse_input(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("takes a text or a list of messages")
    return [_parse_item(item, f"input[{index}]") for index, item in enumerate(value)]


def _parse_item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise ValueError(f"holds something other than messages: {where}")
    if unknown := item.keys() - {"type", "role", "content", "id", "status"}:
        raise ValueError(f"{where}.{min(unknown)[:64]} is not supported by this server")
    return {"role": item.get("role"), "content": _parse_content(item.get("content"), where)}


def _parse_content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
            raise ValueError(f"{where}.content may hold texts only")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.content holds a part without a text")
    return "".join(part["text"] for part in content)


def _parse_text(value: Any) -> dict[str, Any] | None:
    """`text.format` as chat's `response_format`, which checks it."""
    if not isinstance(value, dict) or value.keys() - {"format", "verbosity"}:
        raise ValueError("takes an object with a format")
    given = value.get("format")
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    schema = {name: field for name, field in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


_INPUT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
Input = Annotated[list[dict[str, Any]], PlainValidator(_parse_input), WithJsonSchema(_INPUT_SCHEMA)]
TextOptions = Annotated[
    dict[str, Any] | None, PlainValidator(_parse_text), WithJsonSchema({"type": "object"})
]


class ResponsesRequest(ModelRequest):
    """`POST /v1/responses`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "previous_response_id": (),
        "conversation": (),
        "tools": ([],),
        "tool_choice": ("auto", "none"),
        "parallel_tool_calls": (True, False),
        "include": ([],),
        "background": (False,),
        "truncation": ("disabled",),
        "reasoning": ({},),
        "prompt": (),
        "max_tool_calls": (),
        "top_logprobs": (0,),
        "stream_options": ({},),
    }

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    text: TextOptions = None
    stream: bool = False

    def as_chat(self) -> ChatRequest:
        """The same as a chat request.

        Raises `RequestError` naming a field at fault.
        """
        messages = self.input
        if self.instructions is not None:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        body = {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "response_format": self.text,
            "stream": self.stream,
        }
        return parse_request(ChatRequest, body)[0]
