"""Long plain texts in pieces: nothing is lost, and documents stay whole."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from llmserve.errors import DataError
from llmserve.training.corpus import read_documents
from llmserve.training.data_pieces import read_pieces


def pieces(data: bytes, separator: str, size: int) -> list[tuple[int, bytes]]:
    return list(read_pieces(io.BytesIO(data).read, separator, piece_bytes=size))


def test_short_text_is_one_piece() -> None:
    assert pieces(b"a\n\nb", "", 100) == [(0, b"a\n\nb")]
    assert pieces(b"", "", 100) == [(0, b"")]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_documents_are_those_of_the_whole_text(size: int, end: str) -> None:
    choose = random.Random(size)
    documents = [f"{n} " + "x" * choose.randint(0, 40) for n in range(50)]
    data = f"{end}---{end}".join(documents).encode()
    found = pieces(data, "\n---\n", size)
    split = [
        part for _, piece in found for part in piece.decode().replace("\r\n", "\n").split("\n---\n")
    ]
    assert split == documents
    assert all(data[offset : offset + len(piece)] == piece for offset, piece in found)
    assert size > 500 or len(found) > 1


@pytest.mark.parametrize("size", [1, 16, 300])
@pytest.mark.parametrize(
    "data", ["a b\n\nc\n\n\nd\ne\n" * 9, "ä\r\nö\r\n\r\nü" * 20, "no end " * 30, "\n" * 40]
)
def test_pieces_without_separators_add_up_to_the_text(data: str, size: int) -> None:
    found = pieces(data.encode(), "", size)
    assert b"".join(piece for _, piece in found) == data.encode()
    for _, piece in found:
        piece.decode()


def test_text_is_cut_at_its_last_empty_line_else_at_a_line_end() -> None:
    assert pieces(b"a\n\nb\nccc", "", 8)[0] == (0, b"a\n\n")
    assert pieces(b"a\r\n\r\nb\r\nccc", "", 11)[0] == (0, b"a\r\n\r\n")
    assert pieces(b"aa\nb\nccc", "", 8)[0] == (0, b"aa\nb\n")


def test_corpus_in_pieces_has_the_documents_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n---\n".join(f"document {n} " + "ö" * n for n in range(100)))
    whole = list(read_documents([str(path)], separator="\n---\n").texts)
    monkeypatch.setattr("llmserve.training.data_pieces.PIECE_BYTES", 256)
    parts = read_documents([str(path)], separator="\n---\n")
    assert list(parts.texts) == whole
    assert parts.files[0].bytes == path.stat().st_size


def test_fault_in_a_later_piece_is_named_with_its_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.training.data_pieces.PIECE_BYTES", 16)
    path = tmp_path / "text.txt"
    path.write_bytes(b"fine\n\n" * 10 + b"\xff bad")
    with pytest.raises(DataError, match="0xff at offset 60"):
        read_documents([str(path)])
