"""Texts out of Parquet files: the one door to pyarrow (the extra `parquet`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmserve.errors import DataError, MissingDependencyError

__all__ = ["parquet_texts"]

_ROWS_AT_ONCE = 1024


def parquet_texts(path: Path, column: str) -> Iterator[str]:
    """The strings of `column`, row by row; some thousand rows are in memory at a time.

    Raises:
        DataError: no Parquet file, damaged, no such column, or a row without a string.
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "pyarrow", extra="parquet", feature="reading Parquet files"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(path, file, column)
            row = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text(path, row, column, value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {str(error)[:200]}") from error


def _check_column(path: Path, file: Any, column: str) -> None:
    names = list(file.schema_arrow.names)
    if column not in names:
        raise DataError(
            f"{path}: has no column {column!r}; its columns are {names[:8]}: choose one with "
            "--text-field"
        )


def _text(path: Path, row: int, column: str, value: object) -> str:
    if not isinstance(value, str):
        given = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{path}: row {row} has {given} in column {column!r}, not a string")
    return value
