"""`llmserve data`: the manual of the interpreter that runs the tests, and cleaning."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from llmserve import failpoints
from llmserve.cli import main
from llmserve.training.corpus import read_corpus
from llmserve.training.python_manual import DOCUMENT_SEPARATOR, ManualCorpus


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ManualCorpus(text="A page.\n", num_documents=1, python_version="3")
    monkeypatch.setattr("llmserve.training.python_manual.build_manual", lambda: short)
    (tmp_path / "file").write_text("")
    assert main(["data", "python-manual", "--out", str(tmp_path / "file" / "manual.txt")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def scraped(tmp_path: Path) -> Path:
    """A folder of three pages, two of them alike."""
    page = "<p>A page of some length, which says what pages say.</p>"
    (tmp_path / "pages").mkdir()
    for name, text in (("a", page), ("b", page), ("c", page.replace("page", "leaf"))):
        (tmp_path / "pages" / f"{name}.txt").write_text(text)
    return tmp_path / "pages"


def test_clean_writes_documents_and_says_what_it_took(
    scraped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "new" / "clean.jsonl", tmp_path / "report.json"
    assert main(["data", "clean", str(scraped), "--out", str(out), "--report", str(report)]) == 0
    documents = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert documents == [
        "A page of some length, which says what pages say.",
        "A leaf of some length, which says what leafs say.",
    ]
    written = json.loads(report.read_text())
    removed = {step["name"]: step["removed"] for step in written["steps"] if step["removed"]}
    assert removed == {"duplicates": 1}
    printed = capsys.readouterr().out
    assert written["sha256"] in printed
    assert "duplicates" in printed


def test_clean_prints_its_report_as_json(
    scraped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path / "c.jsonl"), "--json", "--cleaning", "markup"]
    assert main(["data", "clean", str(scraped), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in report["steps"]] == ["markup", "empty"]
    assert report["documents_after"] == 3


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--out", "clean.txt"], 2, "must end in .jsonl"),
        (["--out", "clean.jsonl", "--cleaning", "spelling"], 2, "near-duplicates"),
        (["--out", "clean.jsonl", "--cleaning", "quality", "--separator", " "], 1, "no text in"),
    ],
)
def test_clean_refuses_in_one_line(
    scraped: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(scraped)
    assert main(["data", "clean", str(scraped), *options]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_full_disk_leaves_the_old_text(
    scraped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clean.jsonl"
    out.write_text("old")
    try:
        failpoints.arm("ckpt.write=enospc")
        assert main(["data", "clean", str(scraped), "--out", str(out)]) == 1
    finally:
        failpoints.disarm_all()
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert "No space left" in capsys.readouterr().err
