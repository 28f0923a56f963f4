"""The tokenizer in a GGUF file: ids as llama.cpp would make them, and refusals of what it lacks."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import ExportError
from llmserve.export.gguf_file import GgufValue
from llmserve.export.gguf_tokenizer import tokenizer_metadata
from llmserve.text.tokenizer import Tokenizer
from support.texts import HARD_TEXTS, sentencepiece_like, trained
from support.variants import LLAMA

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CONFIG = dataclasses.replace(LLAMA, vocab_size=420, eos_token_ids=(0,))


def metadata_of(folder: Path, tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    """The values for a tokenizer, written to a folder first, after changes to its file."""
    files = tokenizer.files()
    content = json.loads(files["tokenizer.json"])
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = content
        for name in parents:
            part = part[name]
        part[last] = value
    files["tokenizer.json"] = json.dumps(content).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    values: dict[str, GgufValue] = tokenizer_metadata(folder, CONFIG)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}


def sentencepiece_ids(values: dict[str, Any], text: str) -> list[int]:
    """llama.cpp's `llama` tokenizer: join the neighbours with the best score, leftmost first."""
    ids = {token: index for index, token in enumerate(values["tokens"])}
    if text and values["add_space_prefix"]:
        text = " " + text
    pieces = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [left + right for left, right in pairwise(pieces)]
        scored = [(values["scores"][ids[p]], -i) for i, p in enumerate(pairs) if p in ids]
        if not scored:
            break
        at = -max(scored)[1]
        pieces[at : at + 2] = [pairs[at]]
    found: list[int] = []
    for piece in pieces:
        spelled = [f"<0x{byte:02X}>" for byte in piece.encode()]
        found += [ids[piece]] if piece in ids else [ids[byte] for byte in spelled]
    return found


def test_byte_level_bpe_is_gpt2_with_its_merges(tmp_path: Path) -> None:
    tokenizer = trained("bpe")
    values = metadata_of(tmp_path, tokenizer)
    assert (values["model"], values["pre"]) == ("gpt2", "gpt-2")
    first = json.loads(tokenizer.files()["tokenizer.json"])["model"]["merges"][0]
    assert values["merges"][0] == " ".join(first)
    ids = tokenizer.encode("the list", add_special_tokens=False)
    assert "".join(values["tokens"][i] for i in ids) == "the\u0120list"
    assert len(values["tokens"]) == len(values["token_type"]) == CONFIG.vocab_size
    assert values["token_type"][0] == CONTROL
    assert values["token_type"][1] == NORMAL
    assert values["token_type"][tokenizer.vocab_size :] == [UNUSED] * (420 - tokenizer.vocab_size)
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, 0)
    assert (values["add_bos_token"], values["add_eos_token"]) == (True, False)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_characters_are_written_as_sentencepiece(text: str, tmp_path: Path) -> None:
    tokenizer = trained("char")
    values = metadata_of(tmp_path, tokenizer)
    assert values["model"] == "llama"
    assert values["token_type"][1] == BYTE
    plain = text.replace("<|endoftext|>", "").replace("\u2581", "")  # those marks are not texts
    assert sentencepiece_ids(values, plain) == tokenizer.encode(plain, add_special_tokens=False)


@pytest.mark.parametrize("text", ["the bat", " a  the", "tell the able", "hello 漢 \n", "ththe"])
def test_scores_join_what_the_merges_join(text: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    values = metadata_of(tmp_path, tokenizer)
    assert values["add_space_prefix"]
    assert values["token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert sentencepiece_ids(values, text) == tokenizer.encode(text, add_special_tokens=False)


def test_added_token_that_is_text_is_the_users(tmp_path: Path) -> None:
    tokenizer = trained("bpe")
    added = json.loads(tokenizer.files()["tokenizer.json"])["added_tokens"]
    new_id = tokenizer.vocab_size
    extra = {**added[0], "id": new_id, "content": "<tool>", "special": False}
    values = metadata_of(tmp_path, tokenizer, added_tokens=[*added, extra])
    assert values["tokens"][new_id] == "<tool>"
    assert values["token_type"][new_id] == USER_DEFINED


def test_text_without_a_beginning_gets_none(tmp_path: Path) -> None:
    values = metadata_of(tmp_path, trained("bpe"), post_processor=None)
    assert values["add_bos_token"] is False


def test_chat_template_is_kept(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert metadata_of(tmp_path, trained("bpe"))["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("word", {}, "neither byte-level BPE nor SentencePiece's"),
        ("bpe", {"pre_tokenizer__add_prefix_space": True}, "splitting a text into words is none"),
        ("bpe", {"model__ignore_merges": True}, "splitting a text into words is none"),
        ("bpe", {"normalizer": {"type": "NFC"}}, "it normalizes texts"),
        ("char", {"model__byte_fallback": False}, "neither byte-level BPE nor SentencePiece's"),
        ("char", {"normalizer": {"type": "Lowercase"}}, "treats spaces otherwise"),
        ("char", {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "treats spaces otherwise"),
    ],
)
def test_tokenizer_that_llama_cpp_lacks_is_refused(
    kind: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        metadata_of(tmp_path, trained(kind), **changes)


def test_missing_merge_is_refused(tmp_path: Path) -> None:
    merges = [["\u2581", "a"], ["h", "e"], ["\u2581t", "he"], ["l", "l"]]
    with pytest.raises(ExportError, match="leave out '\u2581' and 't'"):
        metadata_of(tmp_path, sentencepiece_like(), model__merges=merges)


def test_model_without_an_end_is_refused(tmp_path: Path) -> None:
    for name, data in trained("bpe").files().items():
        (tmp_path / name).write_bytes(data)
    config = dataclasses.replace(CONFIG, eos_token_ids=())
    with pytest.raises(ExportError, match="no id that ends a text"):
        tokenizer_metadata(tmp_path, config)


def test_end_that_begins_texts_too_is_named_last(tmp_path: Path) -> None:
    for name, data in trained("bpe").files().items():
        (tmp_path / name).write_bytes(data)
    config = dataclasses.replace(CONFIG, eos_token_ids=(0, 7))
    values = tokenizer_metadata(tmp_path, config)
    assert values["tokenizer.ggml.eos_token_id"] == 7
    assert values["tokenizer.ggml.eot_token_id"] == 0
