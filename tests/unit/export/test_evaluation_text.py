"""The evaluation text: where it comes from, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError, DataError
from llmserve.export.evaluation_text import read_evaluation_text
from llmserve.text.tokenizer import Tokenizer
from support.models import MAX_SEQ_LEN, TEXT, make_model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model")


def config_of(folder: Path) -> ModelConfig:
    return Checkpoint.open(folder).config


def test_text_in_the_folder_is_found(folder: Path) -> None:
    (folder / "evaluation.txt").write_text(TEXT * 9, encoding="utf-8")
    found = read_evaluation_text(folder, config_of(folder), None, max_tokens=10_000)
    assert found.sha256 == hashlib.sha256((TEXT * 9).encode()).hexdigest()
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT * 9, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    assert [token for window in found.windows for token in window[1:]] == ids
    assert all(window[0] == bos and len(window) <= MAX_SEQ_LEN for window in found.windows)


def test_text_that_is_given_goes_before(folder: Path, tmp_path: Path) -> None:
    (folder / "evaluation.txt").write_text("another", encoding="utf-8")
    (tmp_path / "mine.txt").write_text(TEXT, encoding="utf-8")
    found = read_evaluation_text(folder, config_of(folder), tmp_path / "mine.txt", max_tokens=5)
    assert found.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert sum(len(window) - 1 for window in found.windows) == 5


def test_no_text_at_all_says_what_to_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--text FILE .* --no-measure"):
        read_evaluation_text(folder, config_of(folder), None, max_tokens=10)


def test_text_that_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read: No such file"):
        read_evaluation_text(folder, config_of(folder), folder / "absent.txt", max_tokens=10)


def test_text_that_is_no_utf8_is_refused(folder: Path) -> None:
    (folder / "evaluation.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"evaluation\.txt: is no UTF-8"):
        read_evaluation_text(folder, config_of(folder), None, max_tokens=10)


def test_empty_text_is_refused(folder: Path) -> None:
    (folder / "evaluation.txt").write_bytes(b"")
    with pytest.raises(DataError, match="too short"):
        read_evaluation_text(folder, config_of(folder), None, max_tokens=10)


def test_ids_beyond_the_models_vocabulary_are_refused(folder: Path) -> None:
    (folder / "evaluation.txt").write_text(TEXT, encoding="utf-8")
    small = dataclasses.replace(config_of(folder), vocab_size=10)
    with pytest.raises(DataError, match="beyond the model's vocabulary of 10"):
        read_evaluation_text(folder, small, None, max_tokens=10_000)
