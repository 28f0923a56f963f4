"""Rows of labelled data: read from tables, JSON and question-answering files, and held out.

`.jsonl` holds an object a line; `.json` a list of objects, or SQuAD's nesting of articles,
paragraphs and questions (arXiv:1606.05250); `.csv` and `.tsv` a table under a line of names. In
a table with tabs quotation marks are text, as programs that write such tables mean them. Every
row knows its place, so that an error names the line to mend.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.errors import DataError

__all__ = ["Row", "read_rows", "rows_sha256", "split_rows"]

_FORMATS = ("jsonl", "json", "csv", "tsv")
_MAX_FIELD = 1 << 24
"""Longest field of a table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One object of the data."""

    place: str
    """File and line, row or entry, for messages."""
    values: Mapping[str, Any]
    """Fields by our names."""
    group: str = ""
    """Rows of one group are held out together; empty: the row alone."""

    def text(self, name: str, *, is_required: bool = True) -> str:
        """The string in the field `name`; empty where it is absent and need not be there.

        Raises `DataError`, naming the place, if it is no string or empty though required.
        """
        value = self.values.get(name)
        if value is None and not is_required:
            return ""
        if not isinstance(value, str):
            found = f"{value!r:.80}" if name in self.values else f"only {sorted(self.values)}"
            raise DataError(f"{self.place}: the field {name!r} must be a string, found {found}")
        if is_required and not value.strip():
            raise DataError(f"{self.place}: the field {name!r} is empty")
        return value


def read_rows(
    sources: Sequence[Path], *, data_format: str = "auto", columns: Mapping[str, str] | None = None
) -> list[Row]:
    """All rows of the files, in their order.

    Args:
        sources: Files.
        data_format: jsonl, json, csv or tsv; auto: as each file's name ends.
        columns: Our name of a field → its name in the data.

    Raises:
        DataError: a file that cannot be read or is not of its format, a row without a field that
            `columns` names, no rows at all.
    """
    rows = [
        _renamed(row, columns or {})
        for source in sources
        for row in _read_file(source, data_format)
    ]
    if not rows:
        raise DataError(f"no rows in {', '.join(map(str, sources))}")
    return rows


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, picked by a hash of their group, or content, and `seed`.

    Equal rows are on one side. Raises `DataError` if a side that is wanted would be empty.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        key = f"{seed}\n{row.group or _content(row)}"
        fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        (held_out if fraction < share else train).append(row)
    if not train or (share > 0 and not held_out):
        raise DataError(
            f"{len(rows)} rows are too few to hold out {share:.0%} of them: give more rows, or "
            "held-out data of its own"
        )
    return train, held_out


def rows_sha256(rows: Sequence[Row]) -> str:
    """Digest of what the rows say and of their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(hashlib.sha256(_content(row).encode()).digest())
    return digest.hexdigest()


def _content(row: Row) -> str:
    return json.dumps(row.values, sort_keys=True, ensure_ascii=True)


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    if not columns:
        return row
    missing = [theirs for theirs in columns.values() if theirs not in row.values]
    if missing:
        raise DataError(f"{row.place}: no field {missing[0]!r}; it has {sorted(row.values)}")
    kept = {name: value for name, value in row.values.items() if name not in columns.values()}
    renamed = {ours: row.values[theirs] for ours, theirs in columns.items()}
    return Row(row.place, {**kept, **renamed}, row.group)


def _read_file(path: Path, data_format: str) -> Iterator[Row]:
    kind = path.suffix.removeprefix(".").lower() if data_format == "auto" else data_format
    if kind not in _FORMATS:
        raise DataError(
            f"{path}: its name does not end in .{', .'.join(_FORMATS)}; say what it is with "
            "--data-format"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from error
    if kind == "jsonl":
        return _read_lines(path, text)
    return _read_json(path, text) if kind == "json" else _read_table(path, text, kind)


def _read_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}: line {number}"
            yield Row(place, _object(_parse(line, place), place))


def _read_json(path: Path, text: str) -> Iterator[Row]:
    value = _parse(text, str(path))
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        yield from _read_squad(path, value["data"])
        return
    if not isinstance(value, list):
        raise DataError(f"{path}: holds neither a list of objects nor SQuAD's 'data'")
    for number, entry in enumerate(value, 1):
        place = f"{path}: entry {number}"
        yield Row(place, _object(entry, place))


def _read_squad(path: Path, articles: Sequence[Any]) -> Iterator[Row]:
    """Question by question; those of one paragraph are one group."""
    for number, article in enumerate(articles, 1):
        try:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for entry in paragraph["qas"]:
                    values = {
                        "question": entry["question"],
                        "context": context,
                        "answers": entry["answers"],
                    }
                    yield Row(f"{path}: question {entry['id']}", values, group=context)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}: article {number} is not of SQuAD's shape: {error!r}"
            ) from error


def _read_table(path: Path, text: str, kind: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD)
    lines = io.StringIO(text, newline="")
    if kind == "tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names):
            raise DataError(f"{path}: the first line names a column twice: {names}")
        for cells in reader:
            if not cells:
                continue
            place = f"{path}: line {reader.line_num}"
            if len(cells) != len(names):
                raise DataError(
                    f"{place}: has {len(cells)} cells; the first line names {len(names)} columns"
                )
            yield Row(place, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON: {error}") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: holds no object, but {value!r:.60}")
    return value
