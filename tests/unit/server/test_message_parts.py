"""An answer's text taken apart: however it is cut into pieces, the parts are the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from llmserve.server.message_parts import MessageParser, MessagePiece, ReasoningParser
from llmserve.server.tools_calls import (
    CallParser,
    JsonCallParser,
    MarkedCallParser,
    held_back,
    read_calls,
)

CALL = '{"name": "f", "arguments": {"a": "ü"}}'
Parts = tuple[str, str, list[tuple[str, str]]]


def parts(pieces: list[MessagePiece]) -> Parts:
    calls = [call for piece in pieces for call in piece.tool_calls]
    return (
        "".join(piece.reasoning for piece in pieces),
        "".join(piece.content for piece in pieces),
        [(call.name, call.arguments) for call in calls],
    )


def parse(make: Callable[[], MessageParser], texts: list[str]) -> Parts:
    parser = make()
    pieces = [parser.push(text, is_last=False) for text in texts[:-1]]
    return parts([*pieces, parser.push(texts[-1], is_last=True)])


def reasoner(*, is_open: bool = False, calls: CallParser | None = None) -> MessageParser:
    return MessageParser(reasoning=ReasoningParser(is_open=is_open), calls=calls)


def opened() -> MessageParser:
    return reasoner(is_open=True)


def marked() -> MessageParser:
    return MessageParser(calls=MarkedCallParser())


def as_json() -> MessageParser:
    return MessageParser(calls=JsonCallParser())


def both() -> MessageParser:
    return reasoner(calls=MarkedCallParser())


F = ("f", '{"a": "ü"}')
CASES: list[tuple[Callable[[], MessageParser], str, Parts]] = [
    (reasoner, "plain", ("", "plain", [])),
    (reasoner, " \n plain ", ("", " \n plain ", [])),
    (reasoner, "<think>\nwhy\n</think>\n\nso ", ("why", "so ", [])),
    (reasoner, "\n<think> a  b </think>", ("a  b", "", [])),
    (reasoner, "<think></think>c</think>", ("", "c</think>", [])),
    (reasoner, "<think>never </thin over", ("never </thin over", "", [])),
    (reasoner, "<thin air", ("", "<thin air", [])),
    (reasoner, "<", ("", "<", [])),
    (opened, "why</think> so", ("why", "so", [])),
    (opened, "why", ("why", "", [])),
    (marked, "no call", ("", "no call", [])),
    (marked, " \n", ("", " \n", [])),
    (marked, f"Let me.\n<tool_call>\n{CALL}\n</tool_call>\n", ("", "Let me.\n", [F])),
    (marked, f"\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", ("", "", [F, F])),
    (marked, f"<tool_call>{CALL}</tool_call> then", ("", " then", [F])),
    (marked, f"<tool_call>{CALL}", ("", "", [F])),
    (marked, "<tool_call>{oops}</tool_call>", ("", "<tool_call>{oops}</tool_call>", [])),
    (marked, "<tool_call>{oops", ("", "<tool_call>{oops", [])),
    (marked, "a < b <tool", ("", "a < b <tool", [])),
    (as_json, CALL, ("", "", [F])),
    (as_json, f" [{CALL}, {CALL}]", ("", "", [F, F])),
    (as_json, '{"a": 1}', ("", '{"a": 1}', [])),
    (as_json, "{not json", ("", "{not json", [])),
    (as_json, f"text {CALL}", ("", f"text {CALL}", [])),
    (as_json, "", ("", "", [])),
    (both, f"<think>hm <tool</think><tool_call>{CALL}</tool_call>", ("hm <tool", "", [F])),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text", "expected"), CASES, ids=lambda value: repr(value)[:40])
def test_parts_whole_by_characters_and_cut_at_random(
    make: Callable[[], MessageParser], text: str, expected: Parts
) -> None:
    assert parse(make, [text]) == expected
    assert parse(make, [*text, ""]) == expected
    generator = random.Random(1)
    for _ in range(20):
        cuts = sorted(generator.sample(range(len(text) + 1), min(3, len(text) + 1)))
        pieces = [
            text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
        ]
        assert parse(make, pieces) == expected, pieces


def test_nothing_certain_is_held_back() -> None:
    parser = both()
    assert parser.push("The", is_last=False).content == "The"
    assert parser.push(" answer <", is_last=False).content == " answer "
    assert parser.push("b", is_last=False).content == "<b"
    parser = opened()
    assert parser.push("I think", is_last=False).reasoning == "I think"


@pytest.mark.parametrize(
    ("text", "mark", "size"),
    [("abc", "<x>", 0), ("ab<", "<x>", 1), ("ab<x", "<x>", 2), ("<<", "<<<", 2), ("", "<", 0)],
)
def test_held_back(text: str, mark: str, size: int) -> None:
    assert held_back(text, mark) == size


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f"}', [("f", "{}")]),
        ('{"name": "f", "parameters": {"x": 1}}', [("f", '{"x": 1}')]),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', [("f", '{"x": 1}')]),
        ('{"name": 1}', []),
        ('{"name": "f", "arguments": 3}', []),
        ('[{"name": "f"}, 3]', []),
        ("3", []),
        ("[" * 100_000, []),
    ],
)
def test_what_reads_as_a_call(text: str, calls: list[tuple[str, str]]) -> None:
    assert [(call.name, call.arguments) for call in read_calls(text)] == calls


def test_calls_have_ids_of_their_own() -> None:
    first, second = read_calls(json.dumps([{"name": "f"}, {"name": "f"}]))
    assert first.call_id != second.call_id
    assert first.call_id.startswith("call_")
