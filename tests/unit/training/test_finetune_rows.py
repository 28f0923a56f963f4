"""Rows of every format, and errors that name the line to mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.errors import DataError
from llmserve.training.finetune_rows import Row, read_rows, rows_sha256, split_rows


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def values(path: Path, **settings: object) -> list[dict[str, object]]:
    return [dict(row.values) for row in read_rows([path], **settings)]  # type: ignore[arg-type]


def test_the_same_rows_come_from_every_format(tmp_path: Path) -> None:
    expected = [{"text": 'say "hi", you', "label": "a"}, {"text": "ünï", "label": "b"}]
    lines = "\n".join(json.dumps(row) for row in expected)
    table = 'text\tlabel\nsay "hi", you\ta\nünï\tb\n'
    assert values(write(tmp_path, "r.jsonl", lines + "\n\n")) == expected
    assert values(write(tmp_path, "r.json", json.dumps(expected))) == expected
    assert values(write(tmp_path, "r.tsv", table)) == expected
    assert values(write(tmp_path, "r.csv", 'text,label\n"say ""hi"", you",a\nünï,b\n')) == expected
    assert values(write(tmp_path, "table", table), data_format="tsv") == expected


def test_an_open_quotation_mark_in_a_table_with_tabs_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "r.tsv", 'text\tlabel\n"open\ta\nnext\tb\n')
    assert values(path) == [{"text": '"open', "label": "a"}, {"text": "next", "label": "b"}]


def test_questions_of_one_paragraph_are_held_out_together(tmp_path: Path) -> None:
    paragraphs = [
        {
            "context": f"paragraph {number}",
            "qas": [{"id": f"{number}-{q}", "question": f"q{q}", "answers": []} for q in range(5)],
        }
        for number in range(30)
    ]
    path = write(tmp_path, "squad.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    rows = read_rows([path])
    assert len(rows) == 150
    assert rows[7].place == f"{path}: question 1-2"
    train, held_out = split_rows(rows, 0.3, seed=0)
    assert len(train) + len(held_out) == 150
    assert not {row.values["context"] for row in train} & {r.values["context"] for r in held_out}


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", "SMS,Label,more\nhello,ham,1\n")
    columns = {"text": "SMS", "label": "Label"}
    assert values(path, columns=columns) == [{"text": "hello", "label": "ham", "more": "1"}]
    with pytest.raises(DataError, match=r"line 2: no field 'Msg'; it has \['Label', 'SMS'"):
        read_rows([path], columns={"text": "Msg"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"a": 1}\nnonsense\n', "line 2: is not JSON"),
        ("r.jsonl", '{"a": 1}\n\n[1]\n', r"line 3: holds no object, but \[1\]"),
        ("r.json", '{"a": 1}', "neither a list of objects nor SQuAD's"),
        ("r.json", "[1]", "entry 1: holds no object"),
        ("r.json", '{"data": [{"paragraphs": [{"qas": []}]}]}', "article 1 is not of SQuAD's"),
        ("r.csv", "a,b\n1,2\n3\n", "line 3: has 1 cells; the first line names 2"),
        ("r.csv", "a,a\n1,2\n", "names a column twice"),
        ("r.txt", "a", "say what it is with --data-format"),
        ("r.jsonl", "\n", "no rows in"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows([write(tmp_path, name, text)])


def test_bytes_that_are_not_utf8_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8 at byte 7"):
        read_rows([path])
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_rows([tmp_path / "none.jsonl"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "a"}, r"p: the field 'text' must be a string, found only \['label'\]"),
        ({"text": 3}, "found 3"),
        ({"text": "  "}, "p: the field 'text' is empty"),
    ],
)
def test_fields_that_are_no_texts_are_refused(row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Row("p", row).text("text")


def test_the_split_is_by_content_and_seed(tmp_path: Path) -> None:
    rows = [Row(f"r{number}", {"text": f"text {number % 200}"}) for number in range(400)]
    train, held_out = split_rows(rows, 0.2, seed=0)
    assert not {row.values["text"] for row in train} & {row.values["text"] for row in held_out}
    assert 0.1 < len(held_out) / 400 < 0.3
    assert split_rows(rows, 0.2, seed=1)[1] != held_out
    assert split_rows(rows, 0.0, seed=0) == (rows, [])
    with pytest.raises(DataError, match="too few to hold out"):
        split_rows(rows[:1], 0.2, seed=0)
    assert rows_sha256(train) != rows_sha256(train[::-1])
