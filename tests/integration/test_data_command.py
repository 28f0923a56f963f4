"""`llmserve data python-manual` on the interpreter that runs the tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmserve.cli import main
from llmserve.training.corpus import read_corpus
from llmserve.training.python_manual import DOCUMENT_SEPARATOR


def test_manual_is_plain_prose_and_its_digest_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "manual.txt"
    assert main(["data", "python-manual", "--out", str(path)]) == 0
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() in capsys.readouterr().out
    text = data.decode("ascii")
    assert len(text) > 500_000
    assert ">>>" not in text
    paragraphs = [p for p in text.strip().split("\n") if p]
    assert len(set(paragraphs)) == len(paragraphs)
    corpus = read_corpus([str(path)], separator=DOCUMENT_SEPARATOR)
    assert len(corpus.train) > 500
    assert len(corpus.held_out) > 20


def test_text_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["data", "python-manual", "--out", str(tmp_path / "file" / "manual.txt")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
