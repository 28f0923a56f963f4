"""Training: every text comes back, and other programs read the same file alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from llmserve.errors import ConfigError, DataError
from llmserve.text.tokenizer import Tokenizer
from llmserve.text.train import END_OF_TEXT, TokenizerKind, train_tokenizer
from support.texts import CORPUS, HARD_TEXTS, KINDS, trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_comes_back(kind: TokenizerKind, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
def test_text_begins_with_the_end_of_the_one_before(kind: TokenizerKind) -> None:
    tokenizer = trained(kind)
    assert tokenizer.encode("the names")[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer.encode("the names")) == "the names"


def test_known_words_are_one_token_each() -> None:
    ids = trained("word").encode("The list of names", add_special_tokens=False)
    assert [trained("word").token_text(token) for token in ids] == ["The", " list", " of", " names"]


def test_known_characters_are_one_token_each_and_others_their_bytes() -> None:
    tokenizer = trained("char")
    assert len(tokenizer.encode("Grüße", add_special_tokens=False)) == 5
    assert len(tokenizer.encode("ż", add_special_tokens=False)) == 2


def test_merges_shorten_a_text() -> None:
    ids = trained("bpe").encode(CORPUS, add_special_tokens=False)
    assert len(ids) < 0.5 * len(CORPUS)


@pytest.mark.parametrize("kind", KINDS)
def test_same_texts_give_the_same_bytes(kind: TokenizerKind) -> None:
    texts = [CORPUS, "more names"]
    first = train_tokenizer(kind, texts, vocab_size=350)
    assert first == train_tokenizer(kind, iter(texts), vocab_size=350)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [257, 300, 5000])
def test_vocabulary_is_at_most_what_was_asked(kind: TokenizerKind, vocab_size: int) -> None:
    tokenizer = Tokenizer.train(kind, [CORPUS], vocab_size=vocab_size)
    assert 257 <= tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode(CORPUS)) == CORPUS


@pytest.mark.parametrize("vocab_size", [256, 0, 1 << 21])
def test_vocabulary_that_cannot_be_is_refused(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match="vocab_size must be from 257"):
        train_tokenizer("bpe", [CORPUS], vocab_size=vocab_size)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="bpe, word, char"):
        train_tokenizer("letters", [CORPUS], vocab_size=300)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(kind: TokenizerKind, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(kind, texts, vocab_size=300)


@pytest.mark.parametrize("kind", KINDS)
def test_surrogate_in_a_text_is_refused(kind: TokenizerKind) -> None:
    with pytest.raises(DataError, match=r"surrogate '\\ud800' at character 2"):
        train_tokenizer(kind, ["fine", "ab\ud800"], vocab_size=300)


@pytest.mark.parametrize("kind", KINDS)
def test_file_opens_in_the_tokenizers_library(kind: TokenizerKind) -> None:
    files = trained(kind).files()
    other = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in HARD_TEXTS:
        assert other.encode(text).ids == trained(kind).encode(text)
        assert other.decode(other.encode(text).ids) == trained(kind).decode(other.encode(text).ids)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_folder_opens_in_transformers(
    kind: TokenizerKind, model_type: str | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    for name, data in trained(kind).files(model_max_length=128).items():
        (tmp_path / name).write_bytes(data)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    other = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert other.model_max_length == 128
    assert other.bos_token == other.eos_token == END_OF_TEXT
    for text in HARD_TEXTS:
        ids = trained(kind).encode(text)
        assert other(text)["input_ids"] == ids
        assert other.decode(ids, skip_special_tokens=True) == trained(kind).decode(ids)
