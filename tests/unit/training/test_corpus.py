"""Reading, cutting and splitting text; text that cannot be used is refused with its place."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmserve.errors import DataError
from llmserve.training.corpus import Corpus, read_corpus

DOCUMENTS = [f"Document {i} says {i * i}." for i in range(200)]


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(*sources: str, separator: str = "\n---\n", held_out: float = 0.1) -> Corpus:
    return read_corpus(sources, separator=separator, held_out=held_out)


def test_documents_are_cut_at_the_separator_and_split_disjointly(tmp_path: Path) -> None:
    corpus = read(write(tmp_path / "a.txt", "\n---\n".join(DOCUMENTS)))
    assert sorted([*corpus.train, *corpus.held_out]) == sorted(DOCUMENTS)
    assert not set(corpus.train) & set(corpus.held_out)
    assert 5 < len(corpus.held_out) < 40


def test_equal_documents_are_on_one_side(tmp_path: Path) -> None:
    corpus = read(write(tmp_path / "a.txt", "\n---\n".join(DOCUMENTS * 2)))
    assert not set(corpus.train) & set(corpus.held_out)


def test_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "\n---\n".join(DOCUMENTS))
    first = read_corpus([source], separator="\n---\n", seed=1)
    again = read_corpus([source], separator="\n---\n", seed=1)
    assert list(again.held_out) == list(first.held_out)
    assert again.sha256 == first.sha256
    other = read_corpus([source], separator="\n---\n", seed=2)
    assert list(other.held_out) != list(first.held_out)


def test_tail_is_the_end_of_the_text(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000)).strip()
    source = write(tmp_path / "a.txt", text)
    corpus = read_corpus([source], held_out=0.1, held_out_by="tail")
    assert "".join(corpus.train) + "".join(corpus.held_out) == text
    assert len(corpus.held_out[0]) == pytest.approx(len(text) * 0.1, abs=1)


def test_file_without_separator_is_cut_at_empty_lines(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * 100 for i in range(100)]
    corpus = read(write(tmp_path / "a.txt", "\n\n".join(paragraphs)), separator="")
    blocks = [*corpus.train, *corpus.held_out]
    assert len(blocks) > 10
    assert all(block.startswith(tuple(f"{i} " for i in range(100))) for block in blocks)


def test_text_without_empty_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"{i} " + "word " * 20 for i in range(500)]
    corpus = read(write(tmp_path / "a.txt", "\n".join(lines)), separator="", held_out=0.5)
    blocks = [*corpus.train, *corpus.held_out]
    assert len(blocks) > 5
    assert sum(block.count("word") for block in blocks) == 10_000
    assert all(block.startswith(tuple(f"{i} " for i in range(500))) for block in blocks)


def test_lines_of_jsonl_are_documents_whatever_they_hold(tmp_path: Path) -> None:
    texts = [f"{i}\n---\n" + "word\n\n" * 1000 for i in range(60)]
    source = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    corpus = read(source)
    assert sorted([*corpus.train, *corpus.held_out]) == sorted(text.strip("\n") for text in texts)


def test_cleaning_comes_before_the_split_and_is_reported(tmp_path: Path) -> None:
    documents = [f"<p>{text} It is a document of its own.</p>" for text in DOCUMENTS]
    source = write(tmp_path / "a.txt", "\n---\n".join(documents + documents))
    corpus = read_corpus(
        [source], separator="\n---\n", cleaning="markup,spaces,duplicates", held_out=0.1
    )
    kept = [*corpus.train, *corpus.held_out]
    assert sorted(kept) == sorted(f"{text} It is a document of its own." for text in DOCUMENTS)
    assert [(step.name, step.removed) for step in corpus.cleaning.steps][2] == ("duplicates", 200)
    assert [file.name for file in corpus.files] == ["a.txt"]


def test_nothing_left_by_cleaning_is_refused_with_what_it_took(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "1 2 3\n---\n4 5 6")
    with pytest.raises(DataError, match=r"cleaning took 100\.00% of 10 characters \(quality\)"):
        read_corpus([source], separator="\n---\n", cleaning="quality")


def test_folders_patterns_and_jsonl_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "d" / "b.txt", "\n---\n".join(DOCUMENTS[:50]))
    lines = [json.dumps({"text": text, "more": 1}) for text in DOCUMENTS[50:100]]
    write(tmp_path / "d" / "a.jsonl", "\n".join(lines) + "\n\n")
    write(tmp_path / "d" / "image.png", b"\xff\xfe")
    by_folder = read(str(tmp_path / "d"))
    assert sorted([*by_folder.train, *by_folder.held_out]) == sorted(DOCUMENTS[:100])
    by_pattern = read(str(tmp_path / "d" / "*.[jt]*"))
    assert by_pattern.sha256 == by_folder.sha256
    assert by_pattern.files == by_folder.files


def test_standard_input_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO("\n---\n".join(DOCUMENTS).encode())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=data))
    corpus = read("-")
    assert len(corpus.train) + len(corpus.held_out) == len(DOCUMENTS)


def test_text_is_cleaned(tmp_path: Path) -> None:
    text = "\r\n---\r\n".join(f"caf\u0065\u0301 {i}\u00a0!" for i in range(100))
    corpus = read(write(tmp_path / "a.txt", text))
    assert "caf\u00e9 1 !" in [*corpus.train, *corpus.held_out]


def test_digest_sees_every_change(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "\n---\n".join(DOCUMENTS))
    digest = read(source).sha256
    write(tmp_path / "a.txt", "\n---\n".join([*DOCUMENTS[:-1], "Changed."]))
    assert read(source).sha256 != digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n\t ", "no text"),
        ("a.txt", b"fine\xff", "byte 0xff at offset 4"),
        ("a.txt", b"one document alone", "too little text"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_missing_source_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing-here\.txt"):
        read(str(tmp_path / "nothing-here.txt"))
    with pytest.raises(DataError, match="folder with"):
        read(str(tmp_path))
