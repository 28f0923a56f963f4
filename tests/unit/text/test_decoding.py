"""Decoders step by step, against the library's own."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import decoders

from llmserve.text.decoding import TextStream, parse_decoder

MARK = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": list(steps)}


def decode(decoder: dict[str, Any] | None, tokens: list[str]) -> str:
    stream = TextStream(parse_decoder(decoder))
    return "".join([*map(stream.push, tokens), stream.flush()])


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": True}


CASES = [
    ({"type": "ByteLevel"}, decoders.ByteLevel()),
    (sequence({"type": "ByteLevel"}, {"type": "Fuse"}), decoders.ByteLevel()),
    (metaspace("always"), decoders.Metaspace(prepend_scheme="always")),
    (metaspace("first"), decoders.Metaspace(prepend_scheme="first")),
    (metaspace("never"), decoders.Metaspace(prepend_scheme="never")),
    ({"type": "Fuse"}, decoders.Fuse()),
    (REPLACE, decoders.Replace(MARK, " ")),
    (
        sequence({"type": "ByteFallback"}, {"type": "Fuse"}),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    ),
    (
        sequence(REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP),
        decoders.Sequence(
            [
                decoders.Replace(MARK, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    ),
]
TOKENS = [
    [],
    ["the", "list"],
    [f"{MARK}{MARK}the{MARK}", f"{MARK}list", "s", " "],
    [MARK, "a"],
    ["<0x20>", f"{MARK}a"],
    ["<0xE2>", "<0x82>", "<0xac>", "x"],
    ["<0xFF>", "a", "<0xE2>", "b", "<0xZZ>", "<0x4>"],
    ["Ġthe", "Ã©", "Ã", "x", "Ã"],
    ["漢", "Ã", "<|end|>"],
    ["", f"{MARK}a"],
]


@pytest.mark.parametrize("tokens", TOKENS, ids=repr)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_text_equals_the_library(case: int, tokens: list[str]) -> None:
    decoder, oracle = CASES[case]
    assert decode(decoder, tokens) == oracle.decode(tokens)


def test_stray_byte_leaves_the_valid_characters_of_its_run() -> None:
    decoder = sequence({"type": "ByteFallback"}, {"type": "Fuse"})
    euro = ["<0xE2>", "<0x82>", "<0xAC>"]
    assert decode(decoder, [*euro, "<0xAC>", *euro]) == "€\ufffd€"
    assert decode(decoder, ["<0xE2>", "<0x82>", "a"]) == "\ufffd\ufffda"


def test_no_decoder_joins_with_spaces() -> None:
    assert decode(None, ["the", "list"]) == "the list"


def test_stream_keeps_bytes_back_until_the_character_is_whole() -> None:
    stream = TextStream(parse_decoder({"type": "ByteLevel"}))
    assert (stream.push("â"), stream.is_pending) == ("", True)
    assert (stream.push("Ĥ"), stream.is_pending) == ("", True)
    assert (stream.push("¬x"), stream.is_pending) == ("€x", False)


def test_stream_can_go_on_after_a_flush() -> None:
    stream = TextStream(parse_decoder({"type": "ByteLevel"}))
    assert stream.push("â") + stream.flush() + stream.push("¬a") == "\ufffd\ufffda"
