"""Texts of every kind of source; what is no text is refused with its place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmserve.errors import DataError, MissingDependencyError
from llmserve.training import data_sources
from llmserve.training.data_sources import SourceReader


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return str(path)


def read(*sources: str, text_field: str = "text") -> list[str]:
    return [found.text for found in SourceReader(sources, text_field=text_field).texts()]


def test_a_folder_is_read_in_order_of_name(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "x.md", "first")
    write(tmp_path / "c.jsonl", '{"text": "third"}\n\n{"text": "fourth"}')
    write(tmp_path / "d.png", b"\xff")
    reader = SourceReader([str(tmp_path)])
    found = list(reader.texts())
    assert [one.text for one in found] == ["first", "second", "third", "fourth"]
    assert [one.is_document for one in found] == [False, False, True, True]
    assert [file.name for file in reader.files] == ["a/x.md", "b.txt", "c.jsonl"]


def test_files_are_recorded_with_size_and_digest(tmp_path: Path) -> None:
    contents = {"a.txt": "héllo", "b.jsonl": '{"text": "x"}\n{"text": "y"}\n'}
    reader = SourceReader([write(tmp_path / name, text) for name, text in contents.items()])
    list(reader.texts())
    for file, text in zip(reader.files, contents.values(), strict=True):
        data = text.encode()
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "\ufefftext")) == ["text"]
    assert read(write(tmp_path / "a.jsonl", '\ufeff{"text": "x"}\n{"text": "\ufeffy"}')) == [
        "x",
        "\ufeffy",
    ]


def test_a_field_is_chosen_by_name(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"body": "one", "text": "other"}\n')
    assert read(source, text_field="body") == ["one"]


def test_a_pipe_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("through",))
    writer.start()
    assert read(str(path)) == ["through"]
    writer.join()


def test_standard_input_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("é".encode())))
    assert read("-") == ["é"]


def test_rows_of_a_table_are_texts(tmp_path: Path) -> None:
    texts = [f"row {i} é" for i in range(10)]
    source = write_parquet(tmp_path / "a.parquet", {"id": list(range(10)), "body": texts})
    reader = SourceReader([source], text_field="body")
    assert [found.text for found in reader.texts()] == texts
    data = Path(source).read_bytes()
    assert reader.files[0].sha256 == hashlib.sha256(data).hexdigest()
    assert reader.files[0].bytes == len(data)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, r"no column 'text'; its columns are \['body'\]"),
        ({"text": ["a", "b", None]}, "row 3 has nothing in column 'text'"),
        ({"text": [1, 2]}, "row 1 has a int"),
    ],
)
def test_tables_without_text_are_refused(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write_parquet(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize("keep", [0, 3, 40, -9])
def test_torn_tables_are_refused(tmp_path: Path, keep: int) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"text": ["a"] * 20})
    Path(source).write_bytes(Path(source).read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(source)


def test_tables_need_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"llmserve\[parquet\]"):
        read(write(tmp_path / "a.parquet", b"PAR1"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\xff", "byte 0xff at offset 4; convert"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5"),
        ("a.txt", "text".encode("utf-16"), r"offset 0 \(it looks like UTF-16\)"),
        ("a.txt", "text".encode("utf-16-le"), "a binary file: zero byte at offset 1"),
        ("a.txt", gzip.compress(b"text"), r"it looks like gzip"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8.* offset 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"txt": "a", "n": 1}', r"its strings are \['txt'\]: choose one"),
        ("a.jsonl", b'["text"]', "line 1 is no object"),
        ("a.jsonl", b'{"text": 3}', "line 1 is no object"),
        ("a.jsonl", rb'{"text": "\ud800"}', r"surrogate '\\ud800'"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sources, "MAX_LINE_BYTES", 1 << 20)
    line = json.dumps({"text": "x" * (1 << 20)})
    with pytest.raises(DataError, match="line 2 is longer than 1 MiB"):
        read(write(tmp_path / "a.jsonl", '{"text": "a"}\n' + line))


def test_what_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    for source in ("nothing.txt", "*.txt", "no/folder"):
        with pytest.raises(DataError, match="no such text"):
            read(str(tmp_path / source))
    with pytest.raises(DataError, match=r"folder with \.jsonl"):
        read(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "x")
    Path(source).chmod(0)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        read(source)
