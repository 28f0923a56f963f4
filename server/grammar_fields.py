"""The request fields that say what an answer must look like, as a `Grammar` for the engine.

`response_format` is OpenAI's, `structured_outputs` vLLM's. What is wrong inside a schema or an
expression is found by the compiler, in the engine's process; here only its shape is checked.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.errors import RequestError
from llmserve.limits import Limits

__all__ = ["ResponseFormat", "StructuredOutputs", "check_grammar", "json_grammar"]

ANY_OBJECT = {"type": "object"}

PARAM = "structured_outputs"

_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")


def json_grammar(schema: object, *, param: str = "response_format") -> Grammar:
    """A JSON value that `schema` describes, names in the schema's order."""
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False), param)


def check_grammar(grammar: Grammar | None, limits: Limits) -> Grammar | None:
    """`grammar` itself, which can be compiled here and is not too long.

    Raises `RequestError` otherwise.
    """
    if grammar is None:
        return None
    if find_spec("llguidance") is None:
        raise RequestError(
            "this server cannot constrain its output: the package 'llguidance' is not installed "
            "beside it (pip install 'llmserve[structured]')",
            param=grammar.param,
        )
    if len(grammar.text) > limits.max_grammar_chars:
        raise RequestError(
            f"{grammar.param} has {len(grammar.text)} characters; this server allows at most "
            f"{limits.max_grammar_chars}",
            param=grammar.param,
        )
    if grammar.kind is GrammarKind.CHOICE:
        count = len(json.loads(grammar.text))
        if count > limits.max_choice_texts:
            raise RequestError(
                f"{count} choices; this server allows at most {limits.max_choice_texts}",
                param=grammar.param,
            )
    return grammar


def _parse_response_format(value: Any) -> Grammar | None:
    if not isinstance(value, dict):
        raise ValueError("takes an object")
    match value.get("type"):
        case "text" if value.keys() == {"type"}:
            return None
        case "json_object" if value.keys() == {"type"}:
            return json_grammar(ANY_OBJECT)
        case "json_schema" if value.keys() == {"type", "json_schema"}:
            return _named_schema(value["json_schema"])
        case "text" | "json_object" | "json_schema":
            raise ValueError("holds names that do not belong to its type")
    raise ValueError("takes the types text, json_object and json_schema")


def _named_schema(value: Any) -> Grammar:
    """OpenAI's envelope of a schema: `name`, `description`, `strict` change nothing here."""
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict | bool):
        raise ValueError("json_schema takes an object with a schema")
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        if value.get(name) is not None and not isinstance(value[name], kind):
            raise ValueError(f"json_schema.{name} is of the wrong type")
    if unknown := value.keys() - {"name", "description", "strict", "schema"}:
        raise ValueError(f"json_schema.{min(unknown)[:64]} is not known")
    return json_grammar(value["schema"])


def _parse_structured_outputs(value: Any) -> Grammar | None:
    if not isinstance(value, dict):
        raise ValueError("takes an object")
    asked = {name: given for name, given in value.items() if given is not None}
    if unknown := asked.keys() - set(_CONSTRAINTS):
        raise ValueError(f"has no constraint {min(unknown)[:64]!r}")
    if not asked:
        return None
    if len(asked) > 1:
        raise ValueError(f"takes one of {', '.join(_CONSTRAINTS)}")
    ((name, given),) = asked.items()
    return _constraint(name, given)


def _constraint(name: str, given: Any) -> Grammar | None:
    match name, given:
        case "json", dict() | bool():
            return json_grammar(given, param=PARAM)
        case "json", str():
            return Grammar(GrammarKind.JSON_SCHEMA, given, PARAM)
        case "json_object", bool():
            return json_grammar(ANY_OBJECT, param=PARAM) if given else None
        case "regex", str():
            return Grammar(GrammarKind.REGEX, given, PARAM)
        case "grammar", str():
            return Grammar(GrammarKind.GBNF if "::=" in given else GrammarKind.LARK, given, PARAM)
        case "choice", list() if given and all(isinstance(text, str) and text for text in given):
            return Grammar(GrammarKind.CHOICE, json.dumps(given, ensure_ascii=False), PARAM)
    raise ValueError(f"{name} is of the wrong type")


_RESPONSE_FORMAT_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "description": {"type": "string"},
                "strict": {"type": "boolean"},
                "schema": {"type": "object"},
            },
            "required": ["schema"],
        },
    },
    "required": ["type"],
}
_STRUCTURED_OUTPUTS_SCHEMA = {
    "type": "object",
    "properties": {
        "json": {"anyOf": [{"type": "object"}, {"type": "string"}]},
        "regex": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "grammar": {"type": "string"},
        "json_object": {"type": "boolean"},
    },
    "additionalProperties": False,
}
ResponseFormat = Annotated[
    Grammar | None,
    PlainValidator(_parse_response_format),
    WithJsonSchema(_RESPONSE_FORMAT_SCHEMA),
]
StructuredOutputs = Annotated[
    Grammar | None,
    PlainValidator(_parse_structured_outputs),
    WithJsonSchema(_STRUCTURED_OUTPUTS_SCHEMA),
]
