"""Trace files for tests, in both formats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

START = datetime(2024, 2, 28, 23, 59, 58)


def azure_trace(path: Path, rows: Iterable[tuple[float, int, int]]) -> Path:
    """Write (arrival in s, tokens in, tokens out) as the Azure traces are."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for arrival_s, input_len, output_len in rows:
        time = START + timedelta(seconds=arrival_s)
        lines.append(
            f"{time.isoformat(sep=' ', timespec='microseconds')}0,{input_len},{output_len}"
        )
    path.write_bytes("\r\n".join(lines).encode())
    return path


def mooncake_trace(
    path: Path, rows: Iterable[tuple[float, int, int, list[int]]], **columns: list[object]
) -> Path:
    """Write (arrival in s, tokens in, tokens out, keys); `columns` hold further values."""
    lines = []
    for index, (arrival_s, input_len, output_len, keys) in enumerate(rows):
        values: dict[str, object] = {
            "timestamp": round(arrival_s * 1000),
            "input_length": input_len,
            "output_length": output_len,
            "hash_ids": keys,
        }
        values |= {name: column[index] for name, column in columns.items()}
        lines.append(json.dumps(values))
    path.write_text("\n".join(lines) + "\n")
    return path
