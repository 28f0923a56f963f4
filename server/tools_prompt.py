"""How a model learns of tools, and how it is made to call one.

A chat template that reads `tools` writes them in the form its model was trained on. To others they
are described in a system message, in the form that Hermes and Qwen models use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.engine.grammar_compiler import JSON_OPTIONS

from .grammar_fields import ANY_OBJECT
from .tools_calls import CALL_CLOSE, CALL_OPEN
from .tools_fields import Tool

__all__ = ["call_grammar", "with_tools_described"]

Turn = dict[str, Any]


def call_grammar(tools: Sequence[Tool]) -> Grammar:
    """One call, as JSON, of one of `tools`, with arguments that its schema describes."""
    rules = ["start: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        opening = f'{{"name": {json.dumps(tool.name)}, "arguments": '
        schema = {**(tool.parameters or ANY_OBJECT), "x-guidance": JSON_OPTIONS}
        rules.append(f'call_{index}: {json.dumps(opening)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {json.dumps(schema, ensure_ascii=False)}")
    return Grammar(GrammarKind.LARK, "\n".join(rules) + "\n", param="tools")


def with_tools_described(turns: Sequence[Turn], tools: Sequence[Tool]) -> list[Turn]:
    """`turns` for a template that knows no tools: all of it is said in plain messages."""
    plain = [_in_words(turn) for turn in turns]
    if not tools:
        return plain
    text = _description(tools)
    if plain and plain[0]["role"] == "system":
        content = f"{plain[0]['content']}\n\n{text}"
        return [{**plain[0], "content": content}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _description(tools: Sequence[Tool]) -> str:
    lines = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
    return (
        f"You may call these functions:\n{lines}\n"
        f"To call one, write {CALL_OPEN}\n"
        '{"name": "the function", "arguments": {its arguments}}\n'
        f"{CALL_CLOSE}"
    )


def _in_words(turn: Turn) -> Turn:
    if turn["role"] == "tool":
        content = f"<tool_response>\n{turn['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    if calls := turn.get("tool_calls"):
        texts = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
        blocks = "\n".join(f"{CALL_OPEN}\n{text}\n{CALL_CLOSE}" for text in texts)
        return {"role": turn["role"], "content": f"{turn['content'] or ''}{blocks}"}
    return turn
