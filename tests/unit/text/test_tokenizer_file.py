"""Tokenizer files of strangers: refused before, or by, the library, and never fatal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import CheckpointError
from llmserve.text import tokenizer_file
from llmserve.text.tokenizer import Tokenizer
from llmserve.text.tokenizer_file import read_bounded
from support.texts import sentencepiece_json

Change = Callable[[dict[str, Any]], object]

BAD: dict[str, tuple[Change, str]] = {
    "no model": (lambda c: c.pop("model"), "model must be an object"),
    "no vocabulary": (lambda c: c["model"].pop("vocab"), "must be an object or a list"),
    "empty vocabulary": (
        lambda c: (c["model"].update(vocab={}, merges=[]), c.update(added_tokens=[])),
        "model.vocab is empty",
    ),
    "negative id": (lambda c: c["model"]["vocab"].update(a=-1), "'a' has the id -1"),
    "huge id": (lambda c: c["model"]["vocab"].update(a=2**31), "'a' has the id 2147483648"),
    "id is a truth value": (lambda c: c["model"]["vocab"].update(a=True), "'a' has the id True"),
    "id twice": (lambda c: c["model"]["vocab"].update(a=5), "two tokens share one id"),
    "long token": (lambda c: c["model"]["vocab"].update({"é" * 257: 400}), "longer than 512 bytes"),
    "scores without tokens": (lambda c: c["model"].update(vocab=[[1.0]]), "pairs of token"),
    "merges are a number": (lambda c: c["model"].update(merges=3), "merges must be a list"),
    "merge of three": (lambda c: c["model"].update(merges=["a b c"]), "pair of tokens"),
    "merge of unknown tokens": (
        lambda c: c["model"].update(merges=[["x", "y"]]),
        "refused by the tokenizers library",
    ),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "dropout makes encoding random"),
    "panic on loading": (
        lambda c: c["model"].update(continuing_subword_prefix="x" * 100),
        "refused by the tokenizers library",
    ),
    "added token without content": (lambda c: c["added_tokens"][0].pop("content"), "its content"),
    "added token without id": (lambda c: c["added_tokens"][0].pop("id"), "an id of its own"),
    "added tokens share an id": (
        lambda c: c["added_tokens"][0].update(id=1),
        "an id of its own",
    ),
    "added token with another id": (
        lambda c: c["added_tokens"][0].update(id=300),
        "cannot have the id 300",
    ),
    "added tokens are a number": (lambda c: c.update(added_tokens=3), "must be a list"),
    "post-processor adds an id beyond the vocabulary": (
        lambda c: c["post_processor"]["special_tokens"]["<s>"].update(ids=[10**6]),
        "not in the vocabulary",
    ),
    "panic on encoding": (
        lambda c: c["post_processor"]["single"][0]["SpecialToken"].update(id=""),
        "cannot be tokenized",
    ),
    "long string in a part": (
        lambda c: c["normalizer"]["normalizers"][0].update(prepend="x" * 5000),
        "longer than 4096 characters",
    ),
    "too many values in a part": (
        lambda c: c["post_processor"]["special_tokens"]["<s>"].update(ids=[1] * 5000),
        "more than 4096 values",
    ),
    "one normalizer that multiplies": (
        lambda c: c["normalizer"]["normalizers"][1].update(content="x" * 100),
        "64 times longer",
    ),
    "many normalizers that multiply": (
        lambda c: c["normalizer"]["normalizers"].extend(
            [{"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}] * 7
        ),
        "64 times longer",
    ),
    "normalizer that fits between all characters": (
        lambda c: c["normalizer"]["normalizers"][1].update(pattern={"String": ""}),
        "needs a pattern",
    ),
    "unknown decoder": (lambda c: c.update(decoder={"type": "CTC"}), "decoder CTC is not"),
    "decoders in another order": (
        lambda c: c["decoder"]["decoders"].reverse(),
        "decoder Strip is not",
    ),
    "decoder with an expression": (
        lambda c: c["decoder"]["decoders"][0].update(pattern={"Regex": "a+"}),
        "no plain string",
    ),
    "decoder that strips more": (
        lambda c: c["decoder"]["decoders"][3].update(start=2),
        "Strip of other than one",
    ),
    "decoder is a string": (lambda c: c.update(decoder="ByteLevel"), "an object or null"),
    "decoders are a number": (lambda c: c["decoder"].update(decoders=3), "a list of decoders"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tokenizer_is_refused(name: str) -> None:
    change, cause = BAD[name]
    content = sentencepiece_json()
    change(content)
    with pytest.raises(CheckpointError, match=cause) as caught:
        Tokenizer(json.dumps(content).encode(), {})
    assert str(caught.value).startswith("tokenizer.json: ")


def test_vocabulary_beyond_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "MAX_TOKENS", 271)
    with pytest.raises(CheckpointError, match="at most 271"):
        Tokenizer(json.dumps(sentencepiece_json()).encode(), {})


def test_file_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"12345")
    monkeypatch.setattr(tokenizer_file, "MAX_FILE_BYTES", 5)
    assert read_bounded(path) == b"12345"
    monkeypatch.setattr(tokenizer_file, "MAX_FILE_BYTES", 4)
    with pytest.raises(CheckpointError, match="larger than the 4 bytes"):
        read_bounded(path)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_bounded(tmp_path)


def test_scored_vocabulary_is_read() -> None:
    vocab = [["<unk>", 0.0], ["▁", -1.0], ["a", -1.5], ["▁a", -1.0]]
    content = {
        "version": "1.0",
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    }
    tokenizer = Tokenizer(json.dumps(content).encode(), {})
    assert tokenizer.vocab_size == 4
    assert tokenizer.decode(tokenizer.encode("a a aa")) == "a a aa"
